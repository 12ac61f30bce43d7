"""Rank-1 multiplicative late-phase weights: W_k = W ∘ (u_k v_kᵀ), W base (paper section 3.2)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .members import Members, call_each, plain_forward
from .rank1_functions import rank1_linear, rank1_product


LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.LSTM, nn.GRU)
# What `sample_forward` has a formula for; a subclass may compute something else.
PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward, nn.Conv1d.forward, nn.Conv2d.forward)


class Rank1(nn.Module):
    """
    Parametrization that multiplies a base weight by the active member's rank-1 factors.

    Args:
        members (`Members`):
            The shared state.
        weight (`torch.Tensor` of shape `[n, m, ...]`):
            The base weight, for its shape, dtype and device.

    The factors are `left` `[K, n]` and `right` `[K, m]`, both starting at one. For a layer that stores
    `[out, in, ...]` they are the paper's u and v; `Conv1D` stores `[in, out]`, so there they trade places.
    """

    def __init__(self, members: Members, weight: Tensor) -> None:
        super().__init__()
        self.members = members
        rows, columns = weight.shape[:2]
        self.left = nn.Parameter(weight.new_ones(members.num_members, rows))
        self.right = nn.Parameter(weight.new_ones(members.num_members, columns))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the base weight times the active member's factors."""
        return rank1_product(weight, *self.factors())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns the active member's left and right factor; past the lookups of modules, for speed."""
        select, own = self.members.select, self._parameters
        return select(own["left"]), select(own["right"])  # type: ignore[arg-type]

    def fold(self, tensors: dict[str, Tensor]) -> Tensor:
        """Returns W ∘ (mean u)(mean v)ᵀ from the tensors `original`, `0.left` and `0.right`."""
        average = self.members.average
        return rank1_product(tensors["original"], average(tensors["0.left"]), average(tensors["0.right"]))

    def write(self, tensors: dict[str, Tensor], value: Tensor) -> None:
        """Makes the base weight `value` and all factors one."""
        tensors["original"].copy_(value)
        tensors["0.left"].fill_(1)
        tensors["0.right"].fill_(1)


def eligible(module: nn.Module) -> list[str]:
    """Names the tensors of `module` that rank-1 factors can multiply."""
    if not isinstance(module, LAYERS):
        return []
    return [name for name, tensor in module.named_parameters(recurse=False) if tensor.ndim > 1]


def parametrization(members: Members, tensor: Tensor) -> nn.Module:
    """Returns the parametrization of one tensor."""
    return Rank1(members, tensor)


def has_fused_call(module: nn.Module) -> bool:
    """Whether `fused_forward` computes what the layer does."""
    return plain_forward(module) in (nn.Linear.forward, Conv1D.forward)


def fused_forward(module: nn.Module, rows: Tensor) -> Tensor:
    """
    The call of `Linear` or `Conv1D` with the active member's factors, or the average's.

    Unlike the layer's own call with the parametrized weight, it keeps no product from forward to backward pass.
    """
    # Past the modules' attribute lookups, of which there are many to a minibatch.
    parametrized: Any = module._modules["parametrizations"]._modules["weight"]  # type: ignore[union-attr]
    left, right = parametrized._modules["0"].factors()
    weight, bias = parametrized._parameters["original"], module.bias
    return rank1_linear(rows, weight, left, right, bias, transposed=isinstance(module, Conv1D))  # type: ignore[arg-type]


def sample_forward(module: nn.Module, rows: Tensor) -> Tensor:
    """
    The layer's call for rows `[B, ...]` dealt out over the members: u_k ∘ (W (v_k ∘ x)) + b.

    Scaling the activations instead of the weight runs all members through one matrix product.
    """
    layer: Any = module
    parametrizations = layer.parametrizations["weight"]
    weight, members = parametrizations.original, parametrizations[0].members
    left, right = parametrizations[0].left, parametrizations[0].right
    dealt, bias = members.deal(rows), layer.bias
    outputs: Tensor
    forward = plain_forward(module)
    if forward not in PLAIN_FORWARDS:
        return call_each(module, forward, members, (rows,), {})
    if isinstance(module, _ConvNd):
        # Dealt images are [K, B / K, channels, ...]. Each group of channels has the same input factors.
        inputs = right.repeat(1, module.groups)
        scaled = (dealt * members.dealt_view(inputs, dealt, 2)).flatten(0, 1)
        outputs = members.deal(module._conv_forward(scaled, weight, None))
        outputs = (outputs * members.dealt_view(left, outputs, 2)).flatten(0, 1)
        return outputs if bias is None else outputs + bias.view(-1, *[1] * (outputs.ndim - 2))
    if isinstance(module, Conv1D):
        left, right, weight = right, left, weight.T
    outputs = F.linear((dealt * members.dealt_view(right, dealt)).flatten(0, 1), weight)
    outputs = members.deal(outputs)
    outputs = (outputs * members.dealt_view(left, outputs)).flatten(0, 1)
    return outputs if bias is None else outputs + bias
