"""Rank-1 late-phase weights of mixtures of experts, stacked in one tensor: factors for each expert."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from .members import Fixed, Members, call_each, call_with, members_of, plain_forward
from .rank1 import Rank1


class ExpertsRank1(Rank1):
    """
    Parametrization of the weights of E experts, `[E, n, m]`, with factors for each: `left` `[K, E, n]`, `right`
    `[K, E, m]`.

    Args:
        members (`Members`):
            The shared state.
        weight (`torch.Tensor` of shape `[E, n, m]`):
            The base weights.

    Attributes:
        fixed (`Fixed`):
            The product while the layer's own call runs, which reads the weights once an expert.
    """

    def __init__(self, members: Members, weight: Tensor) -> None:
        super().__init__(members, weight)
        experts, rows, columns = weight.shape
        self.left = nn.Parameter(weight.new_ones(members.num_members, experts, rows))
        self.right = nn.Parameter(weight.new_ones(members.num_members, experts, columns))
        self.fixed: Fixed[Tensor] = Fixed()

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the product with the active member's factors, or that of the running call."""
        return super().forward(weight) if self.fixed.value is None else self.fixed.value


def eligible(module: nn.Module) -> list[str]:
    """Names the stacked weights of `module`, if it is a collection of experts as transformers keeps them."""
    if not re.search(r"Experts", type(module).__name__):
        return []
    return [name for name, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3]


def parametrization(members: Members, tensor: Tensor) -> nn.Module:
    """Returns the parametrization of one tensor."""
    return ExpertsRank1(members, tensor)


def member_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call of the layer with each product computed once; rows dealt out are one call a member."""
    members = members_of(layer)
    if members.mode == "sample":
        return call_each(layer, member_forward, members, args, kwargs)
    parametrizations: Any = layer.parametrizations
    values = {name: getattr(layer, name) for name in parametrizations}
    return call_with(layer, plain_forward(layer), values, args, kwargs)
