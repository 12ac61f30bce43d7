"""Measures the statistics of BatchNorm layers over a training set, for averaged weights or for each member."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .late_phase import LatePhase
from .weights import batch_norm


def measure_statistics(
    late_phase: LatePhase,
    minibatches: Callable[[], Iterable[Any]],
    forward: Callable[[Any], Any],
    of_members: bool = False,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> None:
    """
    Measures BatchNorm statistics, which then stand in for the running ones wherever members are averaged.

    As in [`torch.optim.swa_utils.update_bn`], the model runs in training mode and each statistic is the mean over the
    minibatches. Unlike it, this takes minibatches of any kind, counts those of all processes, and leaves the
    statistics that training goes on with as they are. BatchNorm layers that are no late-phase weights are not
    measured. [`forget_statistics`] undoes it.

    Args:
        late_phase (`LatePhase`):
            The members.
        minibatches (`Callable[[], Iterable]`):
            Returns the minibatches of one pass, of this process.
        forward (`Callable[[Any], Any]`):
            Runs the model on one minibatch.
        of_members (`bool`, defaults to `False`):
            Whether to measure with each member in turn, one pass each, instead of once with the averaged weights.
        reduce (`Callable[[torch.Tensor], torch.Tensor]`, *optional*):
            Sums a tensor over all processes.

    Raises:
        `ValueError`: If no BatchNorm layer is a late-phase weight, or there are no minibatches.
    """
    layers = late_phase_layers(late_phase)
    if not layers:
        raise ValueError("No BatchNorm layer is a late-phase weight, so that there are no statistics to measure.")
    try:
        with torch.no_grad(), _measuring(late_phase.model, layers), late_phase.averaged():
            for layer in layers:
                batch_norm.measure(layer, late_phase.num_members if of_members else 1)
            for member in range(late_phase.num_members) if of_members else [None]:
                late_phase.activate(member)
                for minibatch in minibatches():
                    forward(minibatch)
            _reduce(layers, reduce)
    except BaseException:
        forget_statistics(late_phase)
        raise


def forget_statistics(late_phase: LatePhase) -> None:
    """Goes back to the running statistics."""
    for layer in late_phase_layers(late_phase):
        batch_norm.measure(layer, None)


def late_phase_layers(late_phase: LatePhase) -> list[_BatchNorm]:
    """Returns the BatchNorm layers that are late-phase weights and track statistics."""
    modules = dict.fromkeys(t.module for t in late_phase.targets if t.tensor == "running_mean")
    return [late_phase.model.get_submodule(name) for name in modules]  # type: ignore[misc]


@contextlib.contextmanager
def _measuring(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Training mode, in which the layers take the plain mean over minibatches and other BatchNorm layers nothing."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    measured = {id(layer) for layer in layers}
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and id(module) not in measured:
            module.eval()
    for layer in layers:
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training


def _reduce(layers: list[_BatchNorm], reduce: Callable[[Tensor], Tensor]) -> None:
    """Makes the means of all processes one, each weighing by its minibatches."""
    for layer in layers:
        statistics = batch_norm.measured(layer)
        count = statistics.pop("num_batches_tracked")  # [K] or [1]
        total = reduce(count.clone())
        if not total.all():
            raise ValueError("There are no minibatches to measure BatchNorm statistics with.")
        for value in statistics.values():
            value.copy_(reduce(value * count.unsqueeze(1)) / total.unsqueeze(1))
        count.copy_(total)
