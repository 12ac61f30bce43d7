"""Late-phase weights that are copies of whole tensors: the output layer, every weight, and (see norm.py) norms."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .members import Members, members_of, plain_forward


class Replicated(nn.Module):
    """
    Parametrization that keeps K copies `[K, ...]` of a tensor `[...]` and yields the active one.

    Args:
        members (`Members`):
            The shared state.
    """

    def __init__(self, members: Members) -> None:
        super().__init__()
        self.members = members

    def right_inverse(self, tensor: Tensor) -> Tensor:
        """Returns the stack `[K, ...]` of copies."""
        return tensor.detach().repeat(self.members.num_members, *[1] * tensor.ndim)

    def forward(self, stack: Tensor) -> Tensor:
        """Returns the active copy of the stack."""
        return self.members.select(stack)

    def fold(self, tensors: dict[str, Tensor]) -> Tensor:
        """Returns the average of the stack `original`."""
        return self.members.average(tensors["original"])

    def write(self, tensors: dict[str, Tensor], value: Tensor) -> None:
        """Makes all copies `value`."""
        tensors["original"].copy_(value)


def eligible(module: nn.Module) -> list[str]:
    """Names all floating-point parameters of `module` itself."""
    return [name for name, tensor in module.named_parameters(recurse=False) if tensor.is_floating_point()]


def parametrization(members: Members, tensor: Tensor) -> nn.Module:
    """Returns the parametrization of one tensor."""
    return Replicated(members)


def sample_forward(module: nn.Module, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An output layer's call for rows `[B, ..., n]` dealt out over the members, batched."""
    layer: Any = module
    parametrizations = layer.parametrizations
    members, forward = members_of(module), plain_forward(module)
    if forward is not nn.Linear.forward or "weight" not in parametrizations:
        return members.run_each(functools.partial(forward, module), rows, *args, **kwargs)
    dealt = members.deal(rows)
    stack = parametrizations.weight.original
    outputs = torch.bmm(dealt.flatten(1, -2), stack.transpose(1, 2))
    if "bias" in parametrizations:
        outputs = outputs + parametrizations.bias.original.unsqueeze(1)
    elif layer.bias is not None:
        outputs = outputs + layer.bias
    return torch.unflatten(outputs, 1, dealt.shape[1:-1]).flatten(0, 1)
