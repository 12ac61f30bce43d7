"""
The arithmetic of rank-1 products in two Triton kernels: a pass over the weight each, in place of eight and nine.

Imported only where kernels can run (`rank1_fused.py`): triton comes with PyTorch for GPUs, not with that for CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


# What a program works on. Fixed, and never tuned at run time: sums must come out equal to the bit in every run.
ROWS, COLUMNS = 32, 128


def product(weight: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Returns `weight ∘ (left rightᵀ)` in `dtype`, of contiguous tensors `[..., n, m]`, `[..., n]` and `[..., m]`.

    Computed in float32 (float64 of such a weight) and rounded once.
    """
    output = torch.empty_like(weight, dtype=dtype)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        product_kernel[_grid(weight)](weight, left, right, output, *weight.shape[-2:], _wide(weight), ROWS, COLUMNS)
    return output


def gradients(
    grad: Tensor, weight: Tensor, left: Tensor, right: Tensor, grad_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """
    Returns the gradients of both factors from that of the product, in the kernel's own precision.

    Args:
        grad_weight (`torch.Tensor`, *optional*):
            Where the gradient of the weight is written; it may be `grad` itself.
    """
    columns, rows, _ = grid = _grid(weight)
    # Each program writes its own part of the sums: what is added up by whoever comes first differs from run to run.
    dtype = _dtype(weight)
    left_sums = left.new_empty((*left.shape[:-1], columns, left.shape[-1]), dtype=dtype)
    right_sums = right.new_empty((*right.shape[:-1], rows, right.shape[-1]), dtype=dtype)
    output = grad if grad_weight is None else grad_weight
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        gradients_kernel[grid](
            grad, weight, left, right, output, left_sums, right_sums, *weight.shape[-2:], grad_weight is not None,
            _wide(weight), ROWS, COLUMNS,
        )  # fmt: skip
    return left_sums.sum(-2), right_sums.sum(-2)


def _grid(weight: Tensor) -> tuple[int, int, int]:
    rows, columns = weight.shape[-2:]
    batch = weight.shape[0] if weight.ndim == 3 else 1
    return -(-columns // COLUMNS), -(-rows // ROWS), batch


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _wide(weight: Tensor) -> Any:
    return tl.float64 if weight.dtype == torch.float64 else tl.float32


# Rows of factors of several members lie in one stack, so where one begins differs from member to member. Kernels must
# not be compiled anew for that in the middle of training.
_FACTORS = ["left", "right"]


@triton.jit  # type: ignore[untyped-decorator]
def load_block(  # type: ignore[no-untyped-def]
    weight, left, right, n, m, wide: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program's block: expert, rows, columns, where they lie and which exist; its factors and weights."""
    batch = tl.program_id(2).to(tl.int64)  # 64 bits: a weight may have more elements than 32 can count
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = (batch * n + i)[:, None] * m + j[None, :]
    inside = (i < n)[:, None] & (j < m)[None, :]
    u = tl.load(left + batch * n + i, mask=i < n, other=0).to(wide)
    v = tl.load(right + batch * m + j, mask=j < m, other=0).to(wide)
    w = tl.load(weight + at, mask=inside, other=0).to(wide)
    return batch, i, j, at, inside, u, v, w


@triton.jit(do_not_specialize_on_alignment=_FACTORS)  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    weight, left, right, output, n, m,
    wide: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """output = weight * left[:, None] * right, one block."""
    _, _, _, at, inside, u, v, w = load_block(weight, left, right, n, m, wide, ROWS, COLUMNS)
    tl.store(output + at, (w * v[None, :] * u[:, None]).to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=_FACTORS)  # type: ignore[untyped-decorator]
def gradients_kernel(  # type: ignore[no-untyped-def]
    grad, weight, left, right, output, left_sums, right_sums, n, m,
    for_weight: tl.constexpr, wide: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """output = grad * left[:, None] * right; the block's part of the sums of grad * weight, by row and by column."""
    batch, i, j, at, inside, u, v, w = load_block(weight, left, right, n, m, wide, ROWS, COLUMNS)
    g = tl.load(grad + at, mask=inside, other=0).to(wide)
    product = g * w
    rows = (batch * tl.num_programs(0) + tl.program_id(0)) * n + i
    columns = (batch * tl.num_programs(1) + tl.program_id(1)) * m + j
    tl.store(left_sums + rows, tl.sum(product * v[None, :], axis=1), mask=i < n)
    tl.store(right_sums + columns, tl.sum(product * u[:, None], axis=0), mask=j < m)
    if for_weight:
        tl.store(output + at, (g * v[None, :] * u[:, None]).to(output.dtype.element_ty), mask=inside)
