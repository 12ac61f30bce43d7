"""Averages of the weights over time, over base and members: SWA and EMA."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from .config import PointsInTraining
from .sharding import named_parameters


class WeightAverage:
    """
    A running average of a model's weights, kept beside the model.

    Running statistics of BatchNorm layers are averaged like the weights: those of the current weights would not fit
    the average.

    Like [`torch.optim.swa_utils.AveragedModel`] the first update copies; unlike it this copies no module, averages
    half-precision weights in float32, and works on sharded parameters.

    Args:
        model (`torch.nn.Module`):
            The model whose trainable parameters and BatchNorm statistics are averaged.
        ema_decay (`float`, *optional*):
            Decay per training step of an exponential moving average; `None` for the equal average of SWA.
    """

    def __init__(self, model: nn.Module, ema_decay: float | None = None) -> None:
        self.model = model
        self.ema_decay = ema_decay
        self.num_averaged = 0
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, steps: int = 1) -> None:
        """
        Takes the current weights into the average.

        Args:
            steps (`int`, defaults to 1):
                Training steps since the last update; an EMA decays by `ema_decay ** steps`.
        """
        current = {name: _wide(p) for name, p in self.tensors().items()}
        if self.num_averaged == 0:
            self.values = {name: value.clone() for name, value in current.items()}
        else:
            averaged = [self.values[name] for name in current]
            average = get_swa_multi_avg_fn() if self.ema_decay is None else get_ema_multi_avg_fn(self.ema_decay**steps)
            average(averaged, list(current.values()), self.num_averaged)  # type: ignore[arg-type]
        self.num_averaged += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model holds the average, if there is one; the weights come back to the bit."""
        if self.num_averaged == 0:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self.tensors().items()}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        # In place: FSDP and cuDNN hold on to the storage.
        for name, parameter in self.tensors().items():
            parameter.copy_(values[name])

    def tensors(self) -> dict[str, Tensor]:
        """Returns the model's own tensors that are averaged, by name."""
        trained = {name: p for name, p in named_parameters(self.model).items() if p.requires_grad}
        own = dict(self.model.named_buffers()) if self._statistics else {}
        return trained | {name: own[name] for name in self._statistics}

    @functools.cached_property
    def _statistics(self) -> list[str]:
        # Kept: a walk over all modules costs as much as the average itself.
        return list(batch_norm_statistics(self.model))


def batch_norm_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Returns the running means and variances of all BatchNorm layers, late-phase weights or not, by buffer name."""
    statistics = ("running_mean", "running_var")
    names = {
        f"{layer}.{name}".removeprefix(".")
        for layer, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for statistic in statistics
        for name in (statistic, f"parametrizations.{statistic}.original")
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


class AverageSchedule:
    """
    Says when the weights are taken into their average over time.

    An EMA takes them at the end of each step (of each cycle after T0), SWA from `swa_start` on each `swa_every` steps.

    Args:
        points (`PointsInTraining`):
            Where SWA begins and how often it samples.
        step (`int`):
            Where training begins.
    """

    def __init__(self, points: PointsInTraining, step: int) -> None:
        self._points = points
        self.last_step = step

    def sample(self, average: WeightAverage, step: int) -> None:
        """Takes the current weights into the average, if it is time."""
        steps, start = step - self.last_step, self._points.swa_start
        if average.ema_decay is not None:
            average.update(steps)
        elif start is None or step < start or (average.num_averaged and steps < self._points.swa_every):
            return
        else:
            average.update()
        self.last_step = step


def _wide(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.float() if parameter.dtype in (torch.float16, torch.bfloat16) else parameter
