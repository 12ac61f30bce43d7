"""Late-phase weights in DeepSpeed's engine (ZeRO-1 and ZeRO-2), which keeps the gradients and steps by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer
from torch.utils.hooks import RemovableHandle

from ..core.optimizers import FrozenMembers
from ..core.sharding import Storage, rows_like
from .stepping import Stepping


# The groups of an optimizer that hold late-phase weights. DeepSpeed keeps a group's settings, but not its parameters.
LATE_PHASE = "late_phase"


class MasterWeights(Storage):
    """Reads and writes the engine's float32 copies of half-precision weights, each process having a part of them."""

    def __init__(self) -> None:
        # Whether the engine has linked its copies; parameters remember those of an earlier engine.
        self.is_linked = False

    def trained(self, tensor: Tensor) -> Tensor:
        """Returns the float32 value; all processes must call it."""
        if not self.is_linked or tensor.dtype == torch.float32:  # then both are the same
            return tensor.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(tensor)
        return tensor.detach() if master is None else master

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Gives a parameter another value, here and in the engine."""
        super().write(tensor, value)
        if self.is_linked:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(tensor, value.to(tensor.device, torch.float32))


class EngineStepping(Stepping):
    """
    Has DeepSpeed's engine make a cycle of one of Trainer's steps.

    The engine's gradients are those of the cycle's mean loss, as in plain training, so that its clipping and its norm
    mean what they mean there. Algorithm 1 asks for their sum over the members, scaled by γ_θ for the base: a hook of
    the optimizer multiplies what that is about to step with, on each process one part of every group of weights.
    """

    def begin_training(self) -> None:
        """Begins a cycle with the optimizer that the engine has taken apart by now."""
        # Kept: while it steps the engine shows one group only.
        self._late_groups = [group for group in self._trainer.optimizer.param_groups if group[LATE_PHASE]]
        super().begin_training()
        self._members_in_mean = self._late_phase.num_members
        # Of the gradients of the base and of the members, this process's parts.
        self._squares: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._rows: dict[int, Tensor] = {}
        self._row_hooks: list[RemovableHandle] = []
        self._frozen_groups: list[FrozenMembers] = []
        optimizer = self._trainer.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def end_training(self) -> None:
        """Takes the hooks away."""
        for hook in [*self.__dict__.pop("_hooks", []), *self.__dict__.pop("_row_hooks", [])]:
            hook.remove()

    def _in_optimizer(self, late: dict[str, nn.Parameter]) -> list[Tensor]:
        return [part for group in self._late_groups for part in group["params"]]

    def _run_in_cycle(
        self, training_step: Callable[..., Tensor], model: nn.Module, inputs: Any, num_items_in_batch: Any
    ) -> Tensor:
        if self.cycle.rounds == 0:
            factors = self.cycle.member_factors(self._trainer.accumulation_steps)
            if factors is not None:  # a window that the end of an epoch cuts short
                for stack in self._stacks.values():
                    rows = rows_like(stack, factors)
                    self._row_hooks.append(stack.register_hook(rows.mul))
        return super()._run_in_cycle(training_step, model, inputs, num_items_in_batch)

    def norm_and_clip(self, model: nn.Module, max_norm: float) -> Any:
        """Returns the norm with which the engine has clipped and stepped."""
        norm = self._trainer.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        if self.in_cycles:
            self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self._trainer.args.device)
            return self.grad_norm
        return norm

    def before_optimizer(self) -> None:
        """Nothing: the engine has stepped with the last backward pass."""

    def after_optimizer(self) -> None:
        """Ends the cycle."""
        for hook in self._row_hooks:
            hook.remove()
        self._row_hooks = []
        if self.in_cycles:
            self._share_norms()
        super().after_optimizer()

    # ---- inside the engine's step ----

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._late_phase.released:
            return
        absent = self.cycle.absent() if self.in_cycles else []
        for group in optimizer.param_groups:  # ZeRO steps one group after the other
            is_late = group[LATE_PHASE]
            factor = 1.0 if is_late else self.base_gradient_scale
            if self.in_cycles:
                factor *= self._members_in_mean
            for part in group["params"]:
                if part.grad is None:
                    continue
                if self.in_cycles:
                    self._squares[is_late].append(part.grad.float().square().sum())
                if factor != 1:
                    part.grad.mul_(factor)
            if absent and is_late:
                parts = list(group["params"])
                masks = [torch.isin(self._rows_of(part), torch.tensor(absent, device=part.device)) for part in parts]
                self._frozen_groups.append(FrozenMembers(optimizer, parts, masks))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for frozen in self._frozen_groups:
            frozen.restore()
        self._frozen_groups = []

    def _rows_of(self, part: Tensor) -> Tensor:
        """The member to which each element of this process's part of a group belongs."""
        if id(part) not in self._rows:
            self._rows |= self._measure_rows()
        return self._rows[id(part)]

    def _measure_rows(self) -> dict[int, Tensor]:
        """Writes members' numbers in the place of their weights for a moment, to see where the engine keeps which."""
        from deepspeed.utils import safe_set_full_fp32_param

        parts = self._in_optimizer(self._stacks)
        kept = [part.detach().clone() for part in parts]
        for part in parts:
            part.fill_(-1)
        for stack in self._stacks.values():
            numbers = rows_like(stack, [float(member) for member in range(stack.shape[0])])
            safe_set_full_fp32_param(stack, numbers.expand(stack.shape).float().contiguous())
        rows = {id(part): part.to(torch.int64) for part in parts}
        for part, value in zip(parts, kept, strict=True):
            part.copy_(value)
        return rows

    def _share_norms(self) -> None:
        """Has all processes know the norms of base and members, from their parts' squares after clipping."""
        norm = self.grad_norm
        if norm is not None and any(self._squares):  # the engine skips a step whose gradients are not finite
            # An offloaded optimizer's are on the CPU.
            own = [sum((square.to(norm.device) for square in kind), norm.new_zeros(())) for kind in self._squares]
            squares = self._trainer.accelerator.reduce(torch.stack(own), "sum")
            base, late = (norm * (squares / squares.sum().clamp(min=1e-38)).sqrt()).unbind()
            self._monitor.gradient_norms = (base, late)
        self._squares = ([], [])


def mark_groups(optimizer: Optimizer, late: dict[str, nn.Parameter]) -> None:
    """
    Writes into each group of an optimizer whether it is one of late-phase weights, which share none with others.

    Raises:
        `ValueError`: If the engine would not keep the groups.
    """
    if isinstance(optimizer, Adagrad):
        raise ValueError(
            "DeepSpeed's ZeRO replaces torch's Adagrad by one with a single group, but base and members need groups "
            "of their own. Choose optim='adamw_torch_fused', or use DDP."
        )
    own = {id(parameter) for parameter in late.values()}
    for group in optimizer.param_groups:
        group[LATE_PHASE] = any(id(parameter) in own for parameter in group["params"])


def leave_engine(engine: Any) -> None:
    """Takes an engine's hooks off the model that it has trained."""
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
