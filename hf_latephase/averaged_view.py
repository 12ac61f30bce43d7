"""What a trainer evaluates and saves: the average over time, with BatchNorm statistics that fit it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .running_statistics import forget_statistics, measure_statistics


class AveragedView:
    """
    Puts the averages that the config asks for in place of the weights that training goes on with.

    Args:
        trainer (`LatePhaseMixin`):
            The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        # Whether the statistics now measured belong to an average over time; `None` if none are.
        self._measured_over_time: bool | None = None

    @contextlib.contextmanager
    def applied(self, time_averaged: bool = True) -> Iterator[None]:
        """
        Context in which the model holds the averages; the weights come back to the bit.

        Args:
            time_averaged (`bool`, defaults to `True`):
                Whether to use the average over time too, if the config asks for one and there is one.
        """
        average = self._trainer.weight_average
        over_time = time_averaged and average is not None and average.num_averaged > 0
        with average.applied() if over_time else contextlib.nullcontext():
            if self._asked_for(over_time) and self._measured_over_time != over_time:
                self._measure()
                self._measured_over_time = over_time
            yield

    @property
    def differs_from_raw(self) -> bool:
        """Whether there is an average over time and the config asks to evaluate the weights without it, too."""
        average = self._trainer.weight_average
        return self._trainer.late_phase_config.evaluate_raw and average is not None and average.num_averaged > 0

    @contextlib.contextmanager
    def raw(self) -> Iterator[None]:
        """Context in which the model holds its weights without the average over time; draws no random number."""
        with _generators_kept(self._trainer.args.device), self.applied(time_averaged=False):
            yield

    def forget(self) -> None:
        """Drops measured statistics, which no longer fit once the weights change."""
        if self._measured_over_time is not None:
            forget_statistics(self._trainer.late_phase)
            self._measured_over_time = None

    def _asked_for(self, over_time: bool) -> bool:
        trainer = self._trainer
        # Before T0 the model is the plain one, with the statistics that it has.
        has_average = trainer.late_phase.released or over_time
        asked = trainer.late_phase_config.batch_norm_statistics != "running"
        return asked and has_average and trainer.train_dataset is not None

    def _measure(self) -> None:
        trainer = self._trainer
        self.forget()
        with _generators_kept(trainer.args.device):
            measure_statistics(
                trainer.late_phase,
                self._minibatches,
                self._forward,
                of_members=trainer.late_phase_config.batch_norm_statistics == "recomputed_members",
                reduce=trainer.accelerator.reduce,
            )

    def _minibatches(self) -> Iterable[Any]:
        trainer = self._trainer
        hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        return tqdm(trainer.get_train_dataloader(), desc="BatchNorm statistics", leave=False, disable=hidden)

    def _forward(self, minibatch: dict[str, Any]) -> None:
        trainer = self._trainer
        inputs = trainer._prepare_inputs(minibatch)
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, inputs)


@contextlib.contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Training draws the same numbers whether or not statistics were measured meanwhile."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # This process's GPU only: left to itself PyTorch warns that it visits all of the machine's.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
