"""Averages of the weights over time, over base and members: SWA and moving averages."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim.sgd import sgd
from transformers.utils import logging

from .points import PointsInTraining
from .sharding import Storage, named_parameters


logger = logging.get_logger(__name__)


class TimeAverage:
    """
    A running average of a model's weights, kept beside the model.

    The first update copies, later ones average. What is averaged is fixed from then on, whatever is frozen later: the
    parameters that train and the running statistics of BatchNorm layers (those of the current weights would not fit
    the average). A parameter that begins to train later joins with its value then. A sample that holds a value that
    is not finite is left out, decided on the device.

    Unlike [`torch.optim.swa_utils.AveragedModel`] this copies no module, averages half-precision weights in float32,
    and works on sharded parameters.

    Args:
        model (`torch.nn.Module`):
            The model whose trainable parameters and BatchNorm statistics are averaged.
        ema_decay (`float`, *optional*):
            Decay per training step of a moving average; n steps after the first update it is
            `min(ema_decay, (1 + n) / (10 + n))`. `None`, without `ema_memory`: the equal average of SWA.
        ema_memory (`float`, *optional*):
            Memory of a moving average as a share of the steps since the first update; the decay n steps after it is
            `n / (n + 1 / ema_memory - 1)`.
        device (`str`, *optional*):
            Where the average is kept. `None`: beside the weights.
        storage (`Storage`, *optional*):
            Where the weights are that training goes on with, if it has others than the model's.

    Attributes:
        num_averaged (`int`):
            Samples taken so far, those left out included.
        age (`int`):
            Training steps from the first sample to the last.
        values (`dict[str, torch.Tensor]`):
            The average, by parameter and buffer name.
    """

    def __init__(
        self,
        model: nn.Module,
        ema_decay: float | None = None,
        ema_memory: float | None = None,
        device: str | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.model = model
        self._store = storage or Storage()
        self.ema_decay = ema_decay
        self.ema_memory = ema_memory
        self.device = device
        self.num_averaged = 0
        self.age = 0
        self.values: dict[str, Tensor] = {}
        # 0-d, on the average's device: reading it at each update would make the host wait for the step.
        self._left_out: Tensor | None = None
        self._warned = False

    @property
    def is_moving(self) -> bool:
        """Whether later samples weigh more, unlike in SWA."""
        return self.ema_decay is not None or self.ema_memory is not None

    @torch.no_grad()
    def update(self, steps: int = 1) -> None:
        """
        Takes the current weights into the average.

        Args:
            steps (`int`, defaults to 1):
                Training steps since the last update; a moving average decays by the product of their decays, as if
                the weights had been these all the while.
        """
        own = self.tensors()
        names = [n for n, t in own.items() if n in self.values or t.requires_grad or n in self._statistics]
        current = {name: self._taken(own[name]) for name in names}
        norm = get_total_norm(list(current.values()))
        is_finite = (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite()
        newcomers = [name for name in names if name not in self.values]
        # The host waits once, when the average begins or a parameter joins.
        if newcomers and not is_finite.item():
            self._warn()
            return
        if self._left_out is None:
            # The types that the kernels take a tensor of a rate in.
            dtype = torch.float64 if is_finite.device.type == "cpu" else torch.float32
            self._left_out = torch.zeros((), dtype=dtype, device=is_finite.device)
        if self.num_averaged:
            self.age += steps
            self._average([name for name in names if name in self.values], current, steps, ~is_finite)
        for name in newcomers:
            self.values[name] = current[name].clone()
        self.num_averaged += 1

    def _average(self, names: list[str], current: dict[str, Tensor], steps: int, leaves_out: Tensor) -> None:
        averaged = [_elements(self.values[name]) for name in names]
        # The kernel goes through both as they lie in memory.
        samples = [_laid_out_as(own, _elements(current[name])) for name, own in zip(names, averaged, strict=True)]
        weight = self._weight(steps)
        # The interpolation average += weight * (sample - average), as a step of SGD with a weight decay of 1 up the
        # gradient `sample`: the one kernel for many tensors that a flag on the device can call off.
        sgd(
            averaged,
            samples,
            [None] * len(averaged),
            fused=True,
            found_inf=leaves_out.float(),
            weight_decay=1.0,
            momentum=0.0,
            lr=weight,
            dampening=0.0,
            nesterov=False,
            maximize=True,
        )
        assert self._left_out is not None
        self._left_out += leaves_out

    def _weight(self, steps: int) -> float | Tensor:
        if not self.is_moving:
            assert self._left_out is not None
            return 1 / (self.num_averaged + 1 - self._left_out)
        return 1 - math.prod(self.decay_at(n) for n in range(self.age - steps + 1, self.age + 1))

    def decay_at(self, n: int) -> float:
        """Returns a moving average's decay at the n-th training step after its first sample."""
        if self.ema_decay is not None:
            return min(self.ema_decay, (1 + n) / (10 + n))
        assert self.ema_memory is not None
        return n / (n + 1 / self.ema_memory - 1)

    @property
    def num_left_out(self) -> int:
        """Samples left out since the average began; reading it waits for the device."""
        return 0 if self._left_out is None else int(self._left_out.item())

    def warn_of_samples_left_out(self) -> None:
        """Warns, once, if a sample was left out; waits for the device."""
        if not self._warned and self.num_left_out:
            self._warn()

    def _warn(self) -> None:
        if not self._warned:
            logger.warning(
                "A sample of the weights held a value that is not finite and was left out of their average over time; "
                "later ones will be, too, without a word. Look for the step that made it: lower the learning rate, or "
                "clip gradients."
            )
        self._warned = True

    def load(self, values: dict[str, Tensor], num_averaged: int, age: int) -> None:
        """Goes on from an average of `num_averaged` samples, none of them left out, over `age` training steps."""
        own = self.tensors()
        self.values = {
            name: _laid_out_as(own.get(name, value), value.to(self.device or value.device))
            for name, value in values.items()
        }
        self.num_averaged, self.age = num_averaged, age
        self._left_out = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model holds the average, if there is one; the weights come back to the bit."""
        with self.holding(self.values if self.num_averaged else {}):
            yield

    @contextlib.contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Context in which the model holds other values of what is averaged; the weights come back to the bit."""
        kept = self.exchange(values)
        try:
            yield
        finally:
            self._write(kept)

    def exchange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gives the model other values of what is averaged, and returns those that it had, where the average is."""
        own = self.tensors() if values else {}
        kept = {n: own[n].detach().to(self.device or own[n].device, copy=True) for n in values if n in own}
        self._write(values)
        return kept

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        # In place: FSDP and cuDNN hold on to the storage.
        for name, tensor in self.tensors().items() if values else ():
            if name in values:
                tensor.copy_(values[name])

    def tensors(self) -> dict[str, Tensor]:
        """Returns the model's own parameters and BatchNorm statistics by name, those not averaged included."""
        buffers = dict(self.model.named_buffers()) if self._statistics else {}
        return named_parameters(self.model) | {name: buffers[name] for name in self._statistics}

    def _taken(self, tensor: Tensor) -> Tensor:
        """The current value on the average's device, half precision in float32."""
        is_half = tensor.dtype in (torch.float16, torch.bfloat16)
        return self._store.trained(tensor).to(self.device or tensor.device, torch.float32 if is_half else None)

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

    From the average's start on they are taken at the end of each step (of each cycle after T0) that lies at least
    `average_every` steps after the last sample.

    Args:
        points (`PointsInTraining`):
            Where the average begins and how often it samples.
        step (`int`):
            Where training begins.
    """

    def __init__(self, points: PointsInTraining, step: int) -> None:
        self._points = points
        self.last_step = step

    def sample(self, average: TimeAverage, step: int) -> None:
        """Takes the current weights into the average, if it is time."""
        steps, start = step - self.last_step, self._points.average_start
        if average.num_averaged:
            is_due = steps >= self._points.average_every
        else:
            is_due = start is not None and step >= start
        if not is_due:
            return
        average.update(steps)
        self.last_step = step


def _laid_out_as(like: Tensor, value: Tensor) -> Tensor:
    """Returns a value with the strides of another tensor, of whatever type and device (channels last, say)."""
    if isinstance(value, DTensor) or value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def _elements(tensor: Tensor) -> Tensor:
    """The real numbers of a tensor, of a sharded one those of this process."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
