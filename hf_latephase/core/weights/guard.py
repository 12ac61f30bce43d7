"""Keeps user code from writing into a weight that is computed anew for each reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def guarded(value: Tensor) -> Tensor:
    """Returns a computed weight that refuses to be written into; a view of a parameter as it is."""
    # A view can be written into: before T0 it is the one member that lives.
    return value if value._base is not None or torch.compiler.is_compiling() else value.as_subclass(GuardedWeight)


class GuardedWeight(Tensor):
    """
    The average of K members, or a product with factors, as user code sees it between two steps.

    Raises:
        `RuntimeError`: By operations in place, whose result would be lost.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation on the plain tensor, unless it writes into a guarded one."""
        if args and isinstance(args[0], GuardedWeight) and _writes(func):
            raise RuntimeError(
                "This weight has members, and what you hold was computed from them: writing into it would be lost. "
                "Write into each member instead: `for stack in trainer.late_phase.stacks().values(): "
                "stack.data.clamp_(-1, 1)`, or assign a new tensor, `module.weight = value`, to all members at once."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        # What shares its memory must be guarded too; `.data` and `.detach()` are how weights are clipped.
        shares = getattr(func, "__self__", None) is Tensor.data or func is Tensor.detach
        return result.as_subclass(cls) if shares else result


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__setitem__", "__set__"):
        return True
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return name.endswith("_")
