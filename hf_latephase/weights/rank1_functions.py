"""The arithmetic of rank-1 multiplicative weights, W ∘ (left rightᵀ), with backward passes that keep little."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rank1_product(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """
    Returns `weight ∘ (left rightᵀ)`, of a weight `[n, m, ...]` and factors `[n]` and `[m]`.

    Dimensions that all three begin with are a batch: `[E, n, m]`, `[E, n]` and `[E, m]`.
    """
    return _Rank1Product.apply(weight, left, right)


def rank1_linear(rows: Tensor, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Returns `rows (weight ∘ (left rightᵀ))ᵀ + bias`, of rows `[..., m]`, a weight `[n, m]`, factors `[n]` and `[m]`.

    The product is computed once more in the backward pass: kept, it would be a second copy of all weights.
    """
    return _Rank1Linear.apply(rows, weight, left, right, bias)


class _Rank1Product(torch.autograd.Function):
    """`weight * left * right` that keeps no weight-sized intermediate for the backward pass."""

    @staticmethod
    def forward(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return _product(weight, left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, left, right = ctx.saved_tensors
        grad_weight = _product(grad, left, right) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return grad_weight, None, None
        return grad_weight, *_factor_gradients(grad * weight, left, right)


class _Rank1Linear(torch.autograd.Function):
    """A linear layer with a rank-1 product for its weight, of which nothing is kept."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, _product(weight, left, right), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        *kept, bias = inputs
        ctx.save_for_backward(*kept)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, left, right = ctx.saved_tensors
        for_rows, for_weight, for_left, for_right, for_bias = ctx.needs_input_grad
        # Under autocast the forward pass had its inputs in the dtype of the output.
        dtype = grads[0].dtype
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_rows = grad_weight = grad_left = grad_right = grad_bias = None
        if for_rows:
            grad_rows = (grad @ _product(weight, left, right).to(dtype)).view(rows.shape).to(rows.dtype)
        if for_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        if for_weight or for_left or for_right:
            flat = rows.reshape(-1, weight.shape[1]).to(dtype)
            # Laid out like the weight, so that it can become its gradient without a copy.
            outer = grad.T @ flat if weight.is_contiguous() else (flat.T @ grad).T
            outer = outer.to(weight.dtype)
            if for_left or for_right:
                grad_left, grad_right = _factor_gradients(outer * weight, left, right)
            # In place: nobody else has seen it.
            grad_weight = outer.mul_(right).mul_(left.unsqueeze(-1)) if for_weight else None
        return grad_rows, grad_weight, grad_left, grad_right, grad_bias


def _product(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (weight * _columns(right, weight)).mul_(_rows(left, weight))


def _factor_gradients(product: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both factors from `grad ∘ weight`."""
    if product.ndim > left.ndim + 1:
        product = product.flatten(left.ndim + 1).sum(-1)
    if left.ndim == 1:
        return product @ right, left @ product
    return (product @ right.unsqueeze(-1)).squeeze(-1), (left.unsqueeze(-2) @ product).squeeze(-2)


def _rows(left: Tensor, like: Tensor) -> Tensor:
    """Views left factors `[..., n]` so that they broadcast over a weight `[..., n, m, ...]`."""
    return left.view(*left.shape, *[1] * (like.ndim - left.ndim))


def _columns(right: Tensor, like: Tensor) -> Tensor:
    """Views right factors `[..., m]` so that they broadcast over a weight `[..., n, m, ...]`."""
    return right.unsqueeze(-2).view(*right.shape[:-1], 1, right.shape[-1], *[1] * (like.ndim - right.ndim - 1))
