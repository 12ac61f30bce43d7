"""Rank-1 multiplicative late-phase weights: W_k = W ∘ (u_k v_kᵀ), W base (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .members import Members, plain_forward
from .recurrent import RECURRENT_LAYERS


LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, *RECURRENT_LAYERS)
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
        self.left = nn.Parameter(torch.ones(members.num_members, rows, dtype=weight.dtype, device=weight.device))
        self.right = nn.Parameter(torch.ones(members.num_members, columns, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the base weight times the active member's factors."""
        return rank1_product(weight, self.members.select(self.left), self.members.select(self.right))

    def fold(self, tensors: dict[str, Tensor]) -> Tensor:
        """Returns W ∘ (mean u)(mean v)ᵀ from the tensors `original`, `0.left` and `0.right`."""
        average = self.members.average
        return rank1_product(tensors["original"], average(tensors["0.left"]), average(tensors["0.right"]))

    def write(self, tensors: dict[str, Tensor], value: Tensor) -> None:
        """Makes the base weight `value` and all factors one."""
        tensors["original"].copy_(value)
        tensors["0.left"].fill_(1)
        tensors["0.right"].fill_(1)


class _Rank1Product(torch.autograd.Function):
    """`weight * left * right` that keeps no weight-sized intermediate for the backward pass."""

    @staticmethod
    def forward(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (weight * _along(1, right, weight)).mul_(_along(0, left, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        weight, left, right = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_weight = (grad * _along(1, right, grad)).mul_(_along(0, left, grad))
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return grad_weight, None, None
        product = grad * weight
        if product.ndim > 2:
            product = product.flatten(2).sum(-1)
        return grad_weight, product @ right, left @ product


def rank1_product(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns `weight ∘ (left rightᵀ)`, the factors `[n]` and `[m]` along the first two dimensions of `weight`."""
    return _Rank1Product.apply(weight, left, right)


def _along(dim: int, vector: Tensor, like: Tensor) -> Tensor:
    """Views a vector so that it broadcasts along dimension `dim` of `like`."""
    shape = [1] * like.ndim
    shape[dim] = -1
    return vector.view(shape)


def eligible(module: nn.Module) -> list[str]:
    """Names the tensors of `module` that rank-1 factors can multiply."""
    if not isinstance(module, LAYERS):
        return []
    return [name for name, tensor in module.named_parameters(recurse=False) if tensor.ndim > 1]


def parametrization(members: Members, tensor: Tensor) -> nn.Module:
    """Returns the parametrization of one tensor."""
    return Rank1(members, tensor)


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
    forward = plain_forward(module)
    if forward not in PLAIN_FORWARDS:
        return _run_each(module, forward, members, dealt)
    if isinstance(module, _ConvNd):
        # Dealt images are [K, B / K, channels, ...]. Each group of channels has the same input factors.
        inputs = right.repeat(1, module.groups)
        scaled = (dealt * members.dealt_view(inputs, dealt, 2)).flatten(0, 1)
        outputs = members.deal(module._conv_forward(scaled, weight, None))  # type: ignore[operator]
        outputs = (outputs * members.dealt_view(left, outputs, 2)).flatten(0, 1)
        return outputs if bias is None else outputs + _along(1, bias, outputs)
    if isinstance(module, Conv1D):
        left, right, weight = right, left, weight.T
    outputs = F.linear((dealt * members.dealt_view(right, dealt)).flatten(0, 1), weight)
    outputs = members.deal(outputs)
    outputs = (outputs * members.dealt_view(left, outputs)).flatten(0, 1)
    return outputs if bias is None else outputs + bias


def _run_each(module: nn.Module, forward: Callable[..., Tensor], members: Members, dealt: Tensor) -> Tensor:
    """Calls a layer that computes in its own way once a member, on its block of rows."""
    outputs = []
    try:
        for member, block in enumerate(dealt):
            members.activate(member)
            outputs.append(forward(module, block))
    finally:
        members.mode = "sample"
    return torch.cat(outputs)
