"""The arithmetic of rank-1 multiplicative weights, W ∘ (left rightᵀ), with backward passes that keep little."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import rank1_fused


def rank1_product(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """
    Returns `weight ∘ (left rightᵀ)`, of a weight `[n, m, ...]` and factors `[n]` and `[m]`.

    Dimensions that all three begin with are a batch: `[E, n, m]`, `[E, n]` and `[E, m]`.
    """
    (product,) = rank1_products([(weight, left, right)])
    return product


def rank1_products(factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Returns the rank-1 product of each weight, left and right factor; one call of autograd for all of them."""
    products: tuple[Tensor, ...] = _Rank1Products.apply(*itertools.chain.from_iterable(factors))
    return products


def rank1_linear(
    rows: Tensor, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """
    Returns `rows productᵀ + bias`, of rows `[..., m]` and the rank-1 product of a weight `[n, m]`.

    The product is computed once more in the backward pass: kept, it would be a second copy of all weights.

    Args:
        transposed (`bool`, defaults to `False`):
            Whether the weight is stored `[m, n]`, as in `Conv1D`; then it is `rows product + bias`.
    """
    # Views are taken outside: a view that a Function returns could not be changed in place, as some models do. So is
    # the cast that autocast would make inside, where the rows would be kept in both dtypes.
    flat = rows.reshape(-1, rows.shape[-1]).to(_compute_dtype(rows))
    outputs: Tensor = _Rank1Linear.apply(flat, weight, left, right, bias, transposed)
    return outputs if rows.ndim == 2 else outputs.view(*rows.shape[:-1], outputs.shape[-1])


def _compute_dtype(rows: Tensor) -> torch.dtype:
    """That of a linear layer's arithmetic on these rows; autocast leaves float64 alone."""
    device = rows.device.type
    if rows.dtype == torch.float64 or rows.is_meta or not torch.is_autocast_enabled(device):
        return rows.dtype
    return torch.get_autocast_dtype(device)


class _Rank1Products(torch.autograd.Function):
    """`weight * left * right` of every three tensors; no weight-sized intermediate is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        weights, lefts, rights = tensors[::3], tensors[1::3], tensors[2::3]
        return tuple(_product(*factors) for factors in zip(weights, lefts, rights, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        gradients: list[Tensor | None] = []
        for index, grad in enumerate(grads):
            own = slice(3 * index, 3 * index + 3)
            weight, left, right = tensors[own]
            gradients += _gradients(grad, weight, left, right, wanted[own], in_place=False)
        return tuple(gradients)


class _Rank1Linear(torch.autograd.Function):
    """A linear layer, of rows `[B, m]`, with a rank-1 product for its weight, of which nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, left, right)
        ctx.transposed, ctx.bias_dtype = transposed, None if bias is None else bias.dtype
        product = _product(weight, left, right, rows.dtype)
        if transposed and bias is not None:
            return torch.addmm(bias, rows, product)  # as Conv1D, to the bit
        return F.linear(rows, product.T if transposed else product, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, left, right = ctx.saved_tensors
        for_rows, for_weight, for_left, for_right, for_bias, _ = ctx.needs_input_grad
        (grad,) = grads
        grad_rows = grad_weight = grad_left = grad_right = grad_bias = None
        if for_rows:
            product = _product(weight, left, right, grad.dtype)
            grad_rows = grad @ (product.T if ctx.transposed else product)
            del product  # before the gradients, which are as large
        if for_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        if for_weight or for_left or for_right:
            outer = rows.T @ grad if ctx.transposed else grad.T @ rows
            # In place where it can be: nobody else has seen it.
            wanted = (for_weight, for_left, for_right)
            grad_weight, grad_left, grad_right = _gradients(outer, weight, left, right, wanted, in_place=True)
        return grad_rows, grad_weight, grad_left, grad_right, grad_bias, None


def _product(weight: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The product in full precision; the cast to `dtype` is part of the last multiplication, not a pass of its own."""
    fused_dtype = weight.dtype if dtype is None else dtype
    if (kernels := rank1_fused.kernels(weight, left, right, fused_dtype)) is not None:
        product: Tensor = kernels.product(weight, left, right, fused_dtype)
        return product
    scaled, rows = weight * _columns(right, weight), _rows(left, weight)
    if dtype is None or dtype == scaled.dtype:
        return scaled.mul_(rows)
    return torch.mul(scaled, rows, out=torch.empty_like(scaled, dtype=dtype))


def _gradients(
    grad: Tensor, weight: Tensor, left: Tensor, right: Tensor, wanted: Sequence[bool], in_place: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """
    The gradients of weight and factors from that of the product.

    Args:
        wanted (`Sequence[bool]`):
            Whether those of weight, left and right factor are.
        in_place (`bool`):
            Whether the product's may be written over.
    """
    for_weight, for_factors = wanted[0], wanted[1] or wanted[2]
    in_place = in_place and grad.dtype == weight.dtype
    grad_weight = grad_left = grad_right = None
    if for_factors and (kernels := rank1_fused.kernels(weight, left, right, grad.dtype)) is not None:
        grad = grad.contiguous()
        if for_weight:
            grad_weight = grad if in_place else torch.empty_like(weight)
        grad_left, grad_right = kernels.gradients(grad, weight, left, right, grad_weight)
        return grad_weight, grad_left, grad_right
    if for_factors:
        grad_left, grad_right = _factor_gradients(grad * weight, left, right)
    if for_weight:
        columns = _columns(right, weight)
        scaled = grad.mul_(columns) if in_place else grad * columns
        grad_weight = scaled.mul_(_rows(left, weight))
    return grad_weight, grad_left, grad_right


def _factor_gradients(product: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both factors from `grad ∘ weight`."""
    if product.ndim > left.ndim + 1:
        product = product.flatten(left.ndim + 1).sum(-1)
    # A float16 model's under bfloat16 autocast is in float32.
    left, right = left.to(product.dtype), right.to(product.dtype)
    if left.ndim == 1:
        return product @ right, product.T @ left
    return (product @ right.unsqueeze(-1)).squeeze(-1), (left.unsqueeze(-2) @ product).squeeze(-2)


def _rows(left: Tensor, like: Tensor) -> Tensor:
    """Views left factors `[..., n]` so that they broadcast over a weight `[..., n, m, ...]`."""
    if like.ndim == left.ndim + 1:
        return left.unsqueeze(-1)  # what linear layers need: quicker
    return left.view(*left.shape, *[1] * (like.ndim - left.ndim))


def _columns(right: Tensor, like: Tensor) -> Tensor:
    """Views right factors `[..., m]` so that they broadcast over a weight `[..., n, m, ...]`."""
    if right.ndim == 1 and like.ndim == 2:
        return right  # as it is, without views: linear layers are many
    return right.unsqueeze(-2).view(*right.shape[:-1], 1, right.shape[-1], *[1] * (like.ndim - right.ndim - 1))
