"""Measures BatchNorm statistics with a trainer's own training set."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.late_phase import LatePhase
from ..core.running_statistics import measure_statistics
from .adapter import TrainerAdapter


def measure_with(trainer: TrainerAdapter, late_phase: LatePhase, of_members: bool) -> dict[str, Tensor]:
    """
    Measures BatchNorm statistics over a trainer's training set; training draws the same random numbers after it.

    Args:
        trainer (`TrainerAdapter`):
            The trainer, whose training set is passed through once, or once for each member.
        late_phase (`LatePhase`):
            The members on its model.
        of_members (`bool`):
            Whether each member's are measured, or those of their average.
    """

    def minibatches() -> Iterable[Any]:
        hidden = trainer.args.disable_tqdm or trainer.args.local_process_index != 0
        bar: Iterable[Any] = tqdm(trainer.train_dataloader(), desc="BatchNorm statistics", leave=False, disable=hidden)
        return bar

    with generators_kept(trainer.args.device):
        return measure_statistics(
            late_phase, minibatches, trainer.forward, of_members=of_members, reduce=trainer.accelerator.reduce
        )


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Context after which random numbers go on as if it had not been, so that training draws the same ones."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # This process's GPU only: left to itself PyTorch warns that it visits all of the machine's.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
