"""Which optimizers treat a stack of members as separate members."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer


def unwrapped(optimizer: Any) -> Optimizer:
    """Returns the optimizer inside accelerate's and DeepSpeed's wrappers, or one that is not wrapped as it is."""
    inner = getattr(optimizer, "optimizer", optimizer)
    # DeepSpeed's, inside accelerate's, is no Optimizer itself.
    torchs: Optimizer = inner if isinstance(inner, Optimizer) else getattr(inner, "optimizer", inner)
    return torchs


def group_apart(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[int]:
    """Moves parameters out of an optimizer's groups into new ones with the same settings; returns those groups."""
    apart = {id(p) for p in parameters}
    sources = []
    for index, group in enumerate(list(optimizer.param_groups)):
        names = group.get("param_names", [])
        moved = [position for position, p in enumerate(group["params"]) if id(p) in apart]
        if not moved or len(moved) == len(group["params"]):
            continue
        params, rest = group["params"], [i for i in range(len(group["params"])) if i not in set(moved)]
        settings = {name: value for name, value in group.items() if name != "param_names"}
        named: Any = [(names[i], params[i]) if names else params[i] for i in moved]
        group["params"] = [params[i] for i in rest]
        if names:
            group["param_names"] = [names[i] for i in rest]
        optimizer.add_param_group({**settings, "params": named})
        sources.append(index)
    return sources


def check_trained(optimizer: Optimizer, stacks: dict[str, nn.Parameter]) -> None:
    """
    Refuses an optimizer that does not hold all members.

    Raises:
        `ValueError`: Names the first stack that it would leave as it is.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, stack in stacks.items() if stack.requires_grad and id(stack) not in held]
    if missing:
        raise ValueError(
            f"The optimizer does not hold {missing[0]!r}, so these members would never be trained "
            f"({len(missing)} of {len(stacks)}). Was it built from another model? create_optimizer must build it from "
            "the parameters of trainer.model, once train() has begun."
        )


def set_decay(
    optimizer: Optimizer, parameters: Iterable[Tensor], weight_decay: float
) -> list[tuple[dict[str, Any], float]]:
    """Sets the weight decay of the groups, made by [`group_apart`], that hold parameters; returns what they had."""
    own = {id(p) for p in parameters}
    groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
    before = [(group, group["weight_decay"]) for group in groups]
    for group in groups:
        group["weight_decay"] = weight_decay
    return before


def start_afresh(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Takes from an optimizer what it keeps of parameters, as if it had just been built."""
    afresh = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in afresh:
                continue
            optimizer.state.pop(p, None)
            if isinstance(optimizer, Adagrad):  # in torch 2.6 to 2.9 its state must be there before the first step
                value = group["initial_accumulator_value"]
                optimizer.state[p] = {"step": torch.tensor(0.0), "sum": torch.full_like(p, value)}


def check_elementwise(optimizer: Optimizer, stacks: Iterable[Tensor]) -> None:
    """
    Refuses an optimizer whose update of one member depends on the others.

    Members lie stacked in one tensor, which equals separate optimizers only if the update is elementwise. That is
    tried out, not looked up: two steps on a small stack are compared with two steps on its parts, with the settings of
    each group that holds members.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer, whose other groups may do as they like.
        stacks (`Iterable[torch.Tensor]`):
            The members' parameters.

    Raises:
        `ValueError`: If the optimizer mixes elements of a tensor (Adafactor, Muon, LAMB, block-wise 8-bit states).
    """
    own = {id(stack): stack for stack in stacks}
    tried: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        held = [own[id(p)] for p in group["params"] if id(p) in own]
        # Groups of one kind are tried once.
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr", "initial_lr")}
        if held and settings not in tried:
            tried.append(settings)
            _check_settings(optimizer, group, held[0].device)


def _check_settings(optimizer: Optimizer, group: dict[str, Any], device: torch.device) -> None:
    # Matrices and vectors, since some optimizers treat them differently; large and odd enough for 8-bit blocks.
    for shape in ((2, 65, 65), (2, 65)):
        generator = torch.Generator().manual_seed(0)
        stack, *gradients = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
        for gradient in gradients:
            gradient[1] *= 100  # members far apart in size show a norm that is taken over both
        try:
            together = _steps(optimizer, group, [stack], [[g] for g in gradients])[0]
            apart = _steps(optimizer, group, list(stack), [list(g) for g in gradients])
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
    group = next(group for group in optimizer.param_groups if group["params"])
    device = group["params"][0].device
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(65, 65, generator=generator).to(device) for _ in range(3))
    sizes = [
        (_steps(optimizer, group, [start], [[g * scale] for g in gradients], weight_decay=0.0)[0] - start).norm()
        for scale in (1.0, factor)
    ]
    # Closer to the factor than to 1.
    return bool(sizes[1] > math.sqrt(factor) * sizes[0])


def _steps(
    optimizer: Optimizer,
    group: dict[str, Any],
    tensors: list[Tensor],
    gradients: list[list[Tensor]],
    **changed: float,
) -> list[Tensor]:
    """Returns what a fresh optimizer of the same kind, with a group's settings but those changed, makes of tensors."""
    parameters = [nn.Parameter(t.clone()) for t in tensors]
    settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    # The rate is that of a trial: a warm-up from zero would hide every difference.
    trial.param_groups = [{**copy.deepcopy(settings), **changed, "params": parameters, "lr": 0.1}]
    trial.state = defaultdict(dict)
    start_afresh(trial, parameters)
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
            The members' parameters `[K, ...]`, or what the optimizer holds in their place.
        absent (`list[torch.Tensor]`):
            For each of them a mask that broadcasts: the elements of members that stay as they are.
    """

    def __init__(self, optimizer: Optimizer, stacks: list[Tensor], absent: list[Tensor]) -> None:
        self._optimizer = optimizer
        self._stacks = stacks
        self._absent = absent
        self._kept = [[t.detach().clone() for t in self._state(stack)] for stack in stacks]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the rows back. State that the step created starts at zero, as for a member that never stepped."""
        for stack, kept, absent in zip(self._stacks, self._kept, self._absent, strict=True):
            for index, tensor in enumerate(self._state(stack)):
                before = kept[index] if index < len(kept) else torch.zeros_like(tensor)
                tensor.copy_(torch.where(absent, before, tensor))

    def _state(self, stack: Tensor) -> list[Tensor]:
        state = self._optimizer.state.get(stack, {})
        return [stack, *(t for t in state.values() if isinstance(t, Tensor) and t.shape == stack.shape)]
