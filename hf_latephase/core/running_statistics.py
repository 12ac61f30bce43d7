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
from .weights.targets import tracking_layers


def measure_statistics(
    late_phase: LatePhase,
    minibatches: Callable[[], Iterable[Any]],
    forward: Callable[[Any], Any],
    of_members: bool = False,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, Tensor]:
    """
    Measures BatchNorm statistics, which then stand in for the running ones wherever members are averaged.

    As in [`torch.optim.swa_utils.update_bn`], the model runs in training mode and each statistic is the mean over the
    minibatches. Unlike it, this takes minibatches of any kind, counts those of all processes, and leaves the
    statistics that training goes on with as they are. [`forget_statistics`] undoes it.

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

    Returns:
        `dict[str, torch.Tensor]`: The statistics of the layers that are no late-phase weights, by buffer name. Those
        layers hold their running ones again; [`shown`] puts others in their place.

    Raises:
        `ValueError`: If no BatchNorm layer tracks statistics, or there are no minibatches.
    """
    own, plain = late_phase_layers(late_phase), plain_layers(late_phase)
    if not own and not plain:
        raise ValueError("No BatchNorm layer tracks statistics, so that there are none to measure.")
    buffers = statistics_of(plain)
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        with torch.no_grad(), _measuring(late_phase.model, [*own, *plain.values()]), late_phase.averaged():
            for layer in own:
                batch_norm.measure(layer, late_phase.num_members if of_members else 1)
            for layer in plain.values():
                layer.reset_running_stats()
            for member in range(late_phase.num_members) if of_members else [None]:
                late_phase.activate(member)
                for minibatch in minibatches():
                    forward(minibatch)
            _reduce([*map(batch_norm.measured, own), *map(_as_rows, plain.values())], reduce)
        return {name: buffer.clone() for name, buffer in buffers.items()}
    except BaseException:
        forget_statistics(late_phase)
        raise
    finally:
        _write(buffers, kept)


def forget_statistics(late_phase: LatePhase) -> None:
    """Goes back to the running statistics."""
    for layer in late_phase_layers(late_phase):
        batch_norm.measure(layer, None)


@contextlib.contextmanager
def shown(late_phase: LatePhase, statistics: dict[str, Tensor]) -> Iterator[None]:
    """Context in which layers that are no late-phase weights hold statistics that were measured."""
    buffers = statistics_of(plain_layers(late_phase)) if statistics else {}
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    _write(buffers, statistics)
    try:
        yield
    finally:
        _write(buffers, kept)


def late_phase_layers(late_phase: LatePhase) -> list[_BatchNorm]:
    """Returns the BatchNorm layers that are late-phase weights and track statistics, while they are attached."""
    if not late_phase.is_attached:
        return []
    modules = dict.fromkeys(t.module for t in late_phase.targets if t.tensor == "running_mean")
    return [late_phase.model.get_submodule(name) for name in modules]  # type: ignore[misc]


def plain_layers(late_phase: LatePhase) -> dict[str, _BatchNorm]:
    """Returns the other BatchNorm layers that track statistics, by name."""
    own = {id(layer) for layer in late_phase_layers(late_phase)}
    return {name: layer for name, layer in tracking_layers(late_phase.model).items() if id(layer) not in own}


def statistics_of(layers: dict[str, _BatchNorm]) -> dict[str, Tensor]:
    """Returns the running statistics of layers by buffer name."""
    named = {f"{layer}.{name}".removeprefix("."): b for layer, m in layers.items() for name, b in m.named_buffers()}
    return {name: buffer for name, buffer in named.items() if name.rpartition(".")[2] in batch_norm.STATISTICS}


@torch.no_grad()
def _write(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(values[name])


@contextlib.contextmanager
def _measuring(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Training mode, in which the layers take the plain mean over minibatches."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    model.train()
    for layer in layers:
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training


def _as_rows(layer: _BatchNorm) -> dict[str, Tensor]:
    """The statistics of a plain layer as `[1, ...]`, views of its own."""
    return {name: buffer.unsqueeze(0) for name, buffer in layer.named_buffers() if name in batch_norm.STATISTICS}


def _reduce(layers: list[dict[str, Tensor]], reduce: Callable[[Tensor], Tensor]) -> None:
    """Makes the means of all processes one, each weighing by its minibatches."""
    for statistics in layers:
        count = statistics["num_batches_tracked"]  # [K] or [1]
        total = reduce(count.clone())
        if not total.all():
            raise ValueError("There are no minibatches to measure BatchNorm statistics with.")
        for name, value in statistics.items():
            if name != "num_batches_tracked":
                value.copy_(reduce(value * count.unsqueeze(1)) / total.unsqueeze(1))
        count.copy_(total)
