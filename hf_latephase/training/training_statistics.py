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

from ..core.running_statistics import measure_statistics


def measure_with(trainer: Any) -> dict[str, Tensor]:
    """
    Measures the statistics that the trainer's config asks for; training draws the same random numbers after it.

    Args:
        trainer (`LatePhaseMixin`):
            The trainer, whose training set is passed through once, or once for each member.
    """

    def minibatches() -> Iterable[Any]:
        hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        return tqdm(trainer.get_train_dataloader(), desc="BatchNorm statistics", leave=False, disable=hidden)

    def forward(minibatch: dict[str, Any]) -> None:
        inputs = trainer._prepare_inputs(minibatch)
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, inputs)

    with generators_kept(trainer.args.device):
        return measure_statistics(
            trainer.late_phase,
            minibatches,
            forward,
            of_members=trainer.late_phase_config.batch_norm_statistics == "recomputed_members",
            reduce=trainer.accelerator.reduce,
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
