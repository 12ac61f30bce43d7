"""
What rank-1 products move through memory: bytes a weight and minibatch, eager and fused, counted, on any machine.

    python examples/benchmarks/speed/traffic.py
    PYTHONPATH=<another checkout> python examples/benchmarks/speed/traffic.py --fused false    # before a change

Eager arithmetic is counted operation by operation, from the sizes of the tensors that each reads and writes; matrix
products, which plain training has too, are left out. The fused kernels are compiled for an H100 by the compiler that
comes with triton, which needs no GPU, and every load and store of their machine-independent code (PTX) is counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HfArgumentParser

from hf_latephase.core.weights.rank1_functions import rank1_linear


WIDTH = 1024
WARPS, THREADS = 4, 32  # what triton takes unless told otherwise
# Weights, and the dtype of arithmetic.
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16 autocast": (torch.float32, torch.bfloat16),
    "bfloat16 weights": (torch.bfloat16, torch.bfloat16),
}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class TrafficArguments:
    """What is counted."""

    fused: bool = field(default=True, metadata={"help": "Whether to count the fused kernels, which needs triton."})
    capability: int = field(default=90, metadata={"help": "The GPU they are compiled for; 90: H100."})


# ---- eager ----


class Traffic(TorchDispatchMode):
    """
    Counts what operations on tensors as large as a weight read and write, but for matrix products.

    Attributes:
        passes (`int`): How many such tensors were read or written.
        bytes (`int`): Their sizes.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self._elements = elements
        self.passes = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operation = func.name().split("::")[1].split(".")[0]
        if not func.is_view and operation not in ("mm", "addmm", "detach", "empty_like", "_unsafe_view"):
            # What is written in place is read too. What is given to write into (`out`) is what is returned.
            for tensor in tree_leaves((args, output)):
                if isinstance(tensor, Tensor) and tensor.numel() == self._elements:
                    self.passes += 1
                    self.bytes += tensor.nbytes
        return output


def eager(precision: str) -> tuple[float, float]:
    """Passes over a weight, and bytes of each of its elements, of one call and its backward pass."""
    dtype, compute = PRECISIONS[precision]
    # Fewer rows than columns, so that no activation is as large as a weight.
    shapes = ((2, WIDTH), (WIDTH, WIDTH), (WIDTH,), (WIDTH,))
    rows, weight, left, right = (torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute != dtype), Traffic(weight.numel()) as traffic:
        outputs = rank1_linear(rows, weight, left, right)
    with traffic:  # outside of autocast, as in training
        torch.autograd.grad(outputs, (rows, weight, left, right), torch.ones_like(outputs))
    return traffic.passes, traffic.bytes / weight.numel()


# ---- fused ----


def compiled(kernel: str, precision: str, capability: int) -> Any:
    """One kernel, compiled for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_latephase.core.weights import rank1_kernels

    dtype, compute = (SHORT[dtype] for dtype in PRECISIONS[precision])
    pointers = {"weight": dtype, "left": dtype, "right": dtype, "left_sums": "fp32", "right_sums": "fp32"}
    pointers |= {"output": compute} if kernel == "product_kernel" else {"output": dtype, "grad": compute}
    constants = {
        "for_weight": True,
        "wide": rank1_kernels.tl.float32,
        "ROWS": rank1_kernels.ROWS,
        "COLUMNS": rank1_kernels.COLUMNS,
    }
    function = getattr(rank1_kernels, kernel)
    names = function.arg_names
    signature = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    signature |= {name: "constexpr" for name in names if name in constants}
    # As at run time: memory of tensors begins at, and rows are, multiples of 16; of factors no such thing is known.
    aligned = [n for n in names if n not in constants and n not in ("left", "right")]
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, THREADS))


def moved(ptx: str, elements: int) -> float:
    """Bytes that all loads and stores of a program move, an element of its block."""
    pattern = r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)"
    total = sum(int(vector or 1) * int(bits) // 8 for vector, bits in re.findall(pattern, ptx))
    return total * WARPS * THREADS / elements


def fused(precision: str, capability: int) -> tuple[float, float]:
    """Bytes of each element of a weight, in the product's kernel and in the gradients'."""
    from hf_latephase.core.weights import rank1_kernels

    elements = rank1_kernels.ROWS * rank1_kernels.COLUMNS
    product, gradients = (
        moved(compiled(kernel, precision, capability).asm["ptx"], elements)
        for kernel in ("product_kernel", "gradients_kernel")
    )
    return product, gradients


def main() -> None:
    """Counts and prints a table."""
    (arguments,) = HfArgumentParser(TrafficArguments).parse_args_into_dataclasses()
    print("| a weight and minibatch | passes, eager | bytes, eager | product | gradients | bytes, fused |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for precision in PRECISIONS:
        passes, size = eager(precision)
        cells = [f"{passes:.0f}", f"{size:.0f}"]
        if arguments.fused:
            product, gradients = fused(precision, arguments.capability)
            # The product once more in the backward pass. Sums of blocks are read once more.
            cells += [f"2 × {product:.2f}", f"{gradients:.2f}", f"{2 * product + gradients:.1f}"]
        else:
            cells += ["–"] * 3
        print(f"| {precision} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
