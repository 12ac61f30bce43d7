"""Chooses the fused kernels for rank-1 products: on CUDA devices, where they work; elsewhere arithmetic is eager."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.utils import logging


logger = logging.get_logger(__name__)
SWITCH = "HF_LATEPHASE_FUSED"
ENABLED = os.environ.get(SWITCH, "1") != "0"
# Not float64: who computes with that looks for exactness, and compares with the eager formulas.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Not what computes in its own way, as DTensor, nor what only stands for a tensor, as FakeTensor.
CLASSES = (Tensor, nn.Parameter)


def kernels(weight: Tensor, left: Tensor, right: Tensor, other: torch.dtype) -> ModuleType | None:
    """
    Returns the module of kernels for these tensors, or `None` if their arithmetic is eager.

    Args:
        other (`torch.dtype`):
            That of the product, or of its gradient.
    """
    # Inductor fuses the eager formulas with what is around them. The device first: on a CPU nothing else is read.
    if not (ENABLED and is_supported_device(weight)) or torch.compiler.is_compiling():
        return None
    dtype, device = weight.dtype, weight.device
    if weight.ndim > 3 or weight.ndim != left.ndim + 1 or weight.numel() == 0:  # of convolutions
        return None
    if dtype not in DTYPES or other not in DTYPES:
        return None
    for tensor in (weight, left, right):
        alike = tensor.dtype == dtype and tensor.device == device
        if not (alike and type(tensor) in CLASSES and tensor.is_contiguous()):
            return None
    return _working_kernels(device, dtype, other)


def is_supported_device(tensor: Tensor) -> bool:
    """Whether kernels can run where a tensor is."""
    return tensor.is_cuda


@functools.cache
def _working_kernels(device: torch.device, weight: torch.dtype, other: torch.dtype) -> ModuleType | None:
    """
    Returns the module of kernels if they can be compiled, run and compute the right thing on a device.

    So the first step finds out: no compiler, a device that is too old, or a result that is wrong.
    """
    try:
        from . import rank1_kernels

        check(rank1_kernels, device, weight, other)
    except Exception as error:  # of a compiler, a driver or a linker: there is no common class
        logger.warning_once(
            f"Rank-1 weights compute without fused kernels, which takes longer: {type(error).__name__} on {device}"
            f" ({error}). Set {SWITCH}=0 to have it so without this warning."
        )
        logger.debug("The fused kernels failed.", exc_info=error)
        return None
    return rank1_kernels


@torch.no_grad()
def check(module: ModuleType, device: torch.device, weight_dtype: torch.dtype, other: torch.dtype) -> None:
    """
    Compares the kernels with the formulas, on a device.

    Raises:
        `ArithmeticError`: If they differ by more than rounding.
    """

    def values(*shape: int) -> Tensor:
        """No random numbers, which are the training's own; above zero, so that errors are relative to results."""
        return torch.linspace(0, 50, torch.Size(shape).numel(), dtype=torch.float64).sin().add(2).view(shape)

    # Two experts, whose weights are larger than a block and no multiple of it.
    weight, grad = values(2, 40, 300).to(device, weight_dtype), values(2, 40, 300).flip(1).to(device, other)
    left, right = values(2, 40).to(device, weight_dtype), values(2, 300).to(device, weight_dtype)
    grad_weight = torch.empty_like(weight)
    product = module.product(weight, left, right, other)
    ours = (product, grad_weight, *module.gradients(grad, weight, left, right, grad_weight))
    exact = _formulas(*(tensor.double() for tensor in (weight, grad, left, right)))
    for value, expected in zip(ours, exact, strict=True):
        if not ((value.double() - expected).abs() <= 4 * torch.finfo(value.dtype).eps * expected).all():
            raise ArithmeticError("The fused kernels compute something else than the formulas.")


def _formulas(weight: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """The product, and the gradients of weight and factors."""
    left, right = left.unsqueeze(-1), right.unsqueeze(-2)
    return weight * left * right, grad * left * right, (grad * weight * right).sum(-1), (grad * weight * left).sum(-2)
