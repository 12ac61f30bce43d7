"""Which optimizers treat a stack of members as separate members."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .sharding import rows_like


def unwrapped(optimizer: Any) -> Optimizer:
    """Returns the optimizer inside accelerate's wrapper, or one that is not wrapped as it is."""
    return getattr(optimizer, "optimizer", optimizer)


def group_apart(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Moves parameters out of an optimizer's groups into groups of their own, with the same settings."""
    apart = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in apart]
        rest = [p for p in group["params"] if id(p) not in apart]
        if moved and rest:
            group["params"] = rest
            optimizer.add_param_group({**group, "params": moved})


def set_decay(optimizer: Optimizer, parameters: Iterable[Tensor], weight_decay: float) -> list[tuple[dict, float]]:
    """Sets the weight decay of the groups, made by [`group_apart`], that hold parameters; returns what they had."""
    own = {id(p) for p in parameters}
    groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
    before = [(group, group["weight_decay"]) for group in groups]
    for group in groups:
        group["weight_decay"] = weight_decay
    return before


def check_elementwise(optimizer: Optimizer) -> None:
    """
    Refuses an optimizer whose update of one member depends on the others.

    Members lie stacked in one tensor, which equals separate optimizers only if the update is elementwise. That is
    tried out, not looked up: two steps on a small stack are compared with two steps on its parts.

    Raises:
        `ValueError`: If the optimizer mixes elements of a tensor (Adafactor, Muon, LAMB, block-wise 8-bit states).
    """
    device = optimizer.param_groups[0]["params"][0].device
    # Matrices and vectors, since some optimizers treat them differently; large and odd enough for 8-bit blocks.
    for shape in ((2, 65, 65), (2, 65)):
        generator = torch.Generator().manual_seed(0)
        stack, *gradients = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        for gradient in gradients:
            gradient[1] *= 100  # members far apart in size show a norm that is taken over both
        try:
            together = _steps(optimizer, [stack], [[g] for g in gradients])[0]
            apart = _steps(optimizer, list(stack), [list(g) for g in gradients])
        except Exception as error:
            raise ValueError(_refusal(optimizer, f"it cannot update a stack of shape {shape} ({error})")) from error
        if not torch.allclose(together, torch.stack(apart), rtol=1e-5, atol=1e-7):
            reason = "it mixes the elements of a tensor, so members would not be independent"
            raise ValueError(_refusal(optimizer, reason))


def depends_on_gradient_scale(optimizer: Optimizer, factor: float) -> bool:
    """
    Whether an optimizer's steps grow with the gradients, if those are larger by a factor from the beginning.

    Tried out like [`check_elementwise`], without weight decay: SGD's steps grow by the factor, those of Adam, RMSprop
    or Lion stay what they are.
    """
    device = optimizer.param_groups[0]["params"][0].device
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(65, 65, generator=generator).to(device) for _ in range(3))
    sizes = [
        (_steps(optimizer, [start], [[g * scale] for g in gradients], weight_decay=0.0)[0] - start).norm()
        for scale in (1.0, factor)
    ]
    # Closer to the factor than to 1.
    return bool(sizes[1] > math.sqrt(factor) * sizes[0])


def _steps(
    optimizer: Optimizer, tensors: list[Tensor], gradients: list[list[Tensor]], **changed: float
) -> list[Tensor]:
    """Returns what a fresh optimizer of the same kind and settings, but those changed, makes of some tensors."""
    parameters = [nn.Parameter(t.clone()) for t in tensors]
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.state = defaultdict(dict)
    # The rate is that of a trial: a warm-up from zero would hide every difference.
    trial.param_groups = [{**copy.deepcopy(settings), **changed, "params": parameters, "lr": 0.1}]
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        # The class's own step: the instance's may be wrapped by a scheduler or by accelerate.
        type(optimizer).step(trial)
    return [p.detach() for p in parameters]


def _refusal(optimizer: Optimizer, reason: str) -> str:
    return (
        f"{type(optimizer).__name__} cannot train late-phase weights: {reason}. Use an elementwise optimizer such as "
        "SGD, Adam or AdamW (`optim='adamw_torch'`)."
    )


class FrozenMembers:
    """
    Keeps members that saw no minibatch from decaying or coasting on momentum while the others step.

    Their rows, in the weights and in the optimizer's state, are kept before the step and written back after it. A
    step counter that all members share (Adam's) advances for them too.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer about to step.
        stacks (`list[torch.Tensor]`):
            The members' parameters `[K, ...]`.
        absent (`list[int]`):
            The members that stay as they are.
    """

    def __init__(self, optimizer: Optimizer, stacks: list[Tensor], absent: list[int]) -> None:
        self._optimizer = optimizer
        self._stacks = stacks
        self._absent = absent
        self._kept = [[t.detach().clone() for t in self._rows(stack)] for stack in stacks]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the rows back. State that the step created starts at zero, as for a member that never stepped."""
        for stack, kept in zip(self._stacks, self._kept, strict=True):
            absent = rows_like(stack, [float(member in self._absent) for member in range(stack.shape[0])]).bool()
            for index, tensor in enumerate(self._rows(stack)):
                before = kept[index] if index < len(kept) else torch.zeros_like(tensor)
                tensor.copy_(torch.where(absent, before, tensor))

    def _rows(self, stack: Tensor) -> list[Tensor]:
        state = self._optimizer.state.get(stack, {})
        return [stack, *(t for t in state.values() if isinstance(t, Tensor) and t.shape == stack.shape)]
