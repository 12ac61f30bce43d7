"""The gradient side of a cycle: what Trainer's steps do to base and members once minibatches are dealt out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.utils import logging

from ..config import LatePhaseConfig
from ..core.averaging import TimeAverage
from ..core.cycle import Cycle
from ..core.late_phase import LatePhase
from ..core.optimizers import FrozenMembers, depends_on_gradient_scale, set_decay, start_afresh
from ..core.sharding import rows_like
from .adapter import TrainerAdapter
from .monitor import MemberMonitor
from .process_statistics import ProcessStatistics


logger = logging.get_logger(__name__)


def make_cycle(config: LatePhaseConfig, trainer: TrainerAdapter) -> Cycle:
    """Returns a cycle that fits a config and a trainer's arguments, at its beginning."""
    return Cycle(
        num_members=config.num_members,
        length=config.cycle_length,
        accumulation_steps=trainer.args.gradient_accumulation_steps,
        num_processes=trainer.accelerator.num_processes,
        process_index=trainer.accelerator.process_index,
        by_sample=config.member_assignment == "sample",
    )


class Stepping:
    """
    Makes a cycle of a trainer's steps: weighs losses, holds gradients until every member has its own, clips once.

    Args:
        late_phase (`LatePhase`):
            The members.
        config (`LatePhaseConfig`):
            Theirs.
        trainer (`TrainerAdapter`):
            The trainer whose steps they are.
        monitor (`MemberMonitor`):
            Is told the members' losses and gradient norms.

    Attributes:
        cycle (`Cycle`):
            Where training stands in its cycle, once it has begun.
        held (`dict[str, torch.Tensor]`):
            The gradients of an unfinished cycle between two steps, by parameter name.
        grad_norm (`torch.Tensor`, *optional*):
            That of the last whole cycle, logged until the next one ends.
        base_gradient_scale (`float`):
            γ_θ, chosen by the optimizer when training begins if the config leaves it open.
    """

    cycle: Cycle
    # By what the gradients are divided while a cycle collects them, to begin with.
    _members_in_mean = 1

    def __init__(
        self, late_phase: LatePhase, config: LatePhaseConfig, trainer: TrainerAdapter, monitor: MemberMonitor
    ) -> None:
        self._late_phase = late_phase
        self._config = config
        self._trainer = trainer
        self._monitor = monitor
        self._frozen: FrozenMembers | None = None
        self._decays_before: list[tuple[dict[str, Any], float]] = []
        # Kept: a walk over all modules takes longer than all else that a step does for its cycle.
        self._base: dict[str, nn.Parameter] = {}
        self._late: dict[str, nn.Parameter] = {}
        self._scaled: list[nn.Parameter] = []
        self._stacks: dict[str, nn.Parameter] = {}
        self._is_running = False
        # Whether no backward pass was seen that has to be weighed.
        self._unseen = False
        self.held: dict[str, Tensor] = {}
        self.grad_norm: Tensor | None = None
        self.base_gradient_scale = 1.0

    def begin_training(self) -> None:
        """Begins a cycle with the parameters that the trainer has prepared by now, and no gradient held."""
        late_phase = self._late_phase
        self.cycle = self.new_cycle()
        self._statistics = ProcessStatistics(late_phase, self._trainer.accelerator)
        self._base, self._stacks = late_phase.base_parameters(), late_phase.stacks()
        self._late = late_phase.late_parameters()
        self._scaled = [parameter for name, parameter in self._base.items() if name not in self._late]
        self.base_gradient_scale = self._resolve_scale()
        cycle, steps = self.cycle, self._trainer.args.gradient_accumulation_steps
        self._unseen = not cycle.is_plain and (steps > 1 or cycle.loss_divisor != 1)
        self.drop_held()

    def _resolve_scale(self) -> float:
        config = self._config
        if config.base_gradient_scale is not None:
            return float(config.base_gradient_scale)
        if config.num_members == 1:
            return 1.0
        optimizer = self._trainer.optimizer
        depends = depends_on_gradient_scale(optimizer, config.num_members)
        scale = 1.0 if depends else 1 / config.num_members
        logger.info(
            f"base_gradient_scale={scale:g}: the steps of {type(optimizer).__name__} "
            f"{'grow' if depends else 'do not grow'} with the gradients."
        )
        return scale

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._base | self._stacks

    def new_cycle(self) -> Cycle:
        """Returns a cycle that fits the config and the trainer's arguments, at its beginning."""
        return make_cycle(self._config, self._trainer)

    @property
    def in_cycles(self) -> bool:
        """Whether minibatches are dealt out; plain training needs nothing of it."""
        return self._late_phase.released and not self.cycle.is_plain

    @property
    def cycle_is_open(self) -> bool:
        """Whether the last step left a cycle unfinished."""
        return self.in_cycles and self.cycle.step > 0

    def release_if_due(self, start: int, average: TimeAverage | None) -> None:
        """Begins the late phase once training has come to the step `start`; the average over time gets members too."""
        trainer, late_phase = self._trainer, self._late_phase
        if late_phase.released or trainer.state.global_step < start:
            return
        self._statistics.broadcast()
        # Seeded alike on every process, and apart from the generators that training uses.
        late_phase.release(torch.Generator().manual_seed(trainer.args.seed))
        decay = self._config.member_weight_decay
        if decay is not None:
            self._decays_before = set_decay(trainer.optimizer, self._in_optimizer(self._late), decay)
        if late_phase.num_members == 1:
            return
        logger.info(f"Late phase begins at step {trainer.state.global_step}.\n{late_phase.summary()}")
        # The members' optimizers, as in the reference code.
        start_afresh(trainer.optimizer, self._in_optimizer(self._stacks))
        if average is not None and average.num_averaged:
            names = [name for name in average.values if late_phase.is_late_phase(name)]
            late_phase.share_first_member([average.values[name] for name in names])

    def _in_optimizer(self, late: dict[str, nn.Parameter]) -> list[Tensor]:
        """What the optimizer holds in the place of late-phase weights."""
        return list(late.values())

    def rejoin(self) -> None:
        """Undoes a release, for training that begins anew with the same model and optimizer."""
        self._late_phase.rejoin()
        for group, decay in self._decays_before:
            group["weight_decay"] = decay
        self._decays_before = []

    # ---- one minibatch ----

    def run(
        self, training_step: Callable[..., Tensor], model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """
        Runs a minibatch with the member whose turn it is, its gradient weighed as the cycle asks.

        A `training_step` may call that of its parent's, which then comes here again: it is one minibatch all the same.

        Args:
            training_step (`Callable`):
                Trainer's `training_step(model, inputs, num_items_in_batch)`, forward and backward pass.
            model (`torch.nn.Module`), inputs (`Any`), num_items_in_batch (`Any`, *optional*):
                Its arguments; what the inputs are is the trainer's own business.

        Returns:
            `torch.Tensor`: The loss on Trainer's scale, on which the losses of a step add up to their mean.
        """
        if self._is_running:
            return training_step(model, inputs, num_items_in_batch)
        self._is_running = True
        try:
            if self.in_cycles:
                return self._run_in_cycle(training_step, model, inputs, num_items_in_batch)
            self._late_phase.activate(0)
            with self._weighed_gradients(1.0):
                return training_step(model, inputs, num_items_in_batch)
        finally:
            self._is_running = False

    def _run_in_cycle(
        self, training_step: Callable[..., Tensor], model: nn.Module, inputs: Any, num_items_in_batch: Any
    ) -> Tensor:
        trainer, cycle = self._trainer, self.cycle
        self._restore_gradients()
        member = cycle.next_member()
        if cycle.by_sample:
            self._late_phase.activate_by_sample()
        else:
            self._late_phase.activate(member)
        self._statistics.count(None if cycle.by_sample else member)
        # A step of the parent's gives each minibatch one part in `steps` of the gradient, a cycle 1 / loss_divisor.
        steps = trainer.accumulation_steps
        weighed = self._weighed_gradients(steps / cycle.loss_divisor / self._members_in_mean)
        with self._synchronised_once_a_cycle(model), trainer.own_mean(), weighed:
            loss = training_step(model, inputs, trainer.own_items(inputs, num_items_in_batch))
        if cycle.rounds == 1 and trainer.has_cuda_graphs:
            self._copy_gradients()
        self._monitor.add(member, loss, steps)
        return loss

    def _copy_gradients(self) -> None:
        """Takes gradients out of the memory that the next minibatch's CUDA graph writes into."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    @contextlib.contextmanager
    def _weighed_gradients(self, factor: float) -> Iterator[None]:
        if factor == 1 and not self._unseen:
            yield
            return
        with self._trainer.weighed_backward(factor, is_required=self._unseen):
            yield
        self._unseen = False

    def _synchronised_once_a_cycle(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside a cycle, keeps the optimizer from stepping and processes from exchanging gradients."""
        state = self._trainer.state
        is_last_step = state.global_step + 1 >= state.max_steps
        if self._trainer.accelerator.sync_gradients and not self.cycle.completes_at_next_step(is_last_step):
            return self._trainer.held_back(model)
        return contextlib.nullcontext()

    # ---- one of Trainer's steps ----

    def norm_and_clip(self, model: nn.Module, max_norm: float) -> Any:
        """Returns the gradient norm of the mean loss, and clips to it, once a cycle."""
        accelerator = self._trainer.accelerator
        if self.in_cycles:
            if accelerator.sync_gradients:
                self.grad_norm = self._clip_cycle(max_norm)
            return self.grad_norm
        if self._late_phase.num_members == 1 or self._trainer.is_fsdp_enabled:
            return accelerator.clip_grad_norm_(model.parameters(), max_norm)
        # Idle members stay out of the norm, so that it is to the bit that of a run with one member.
        accelerator.unscale_gradients()
        stacks = {id(p) for p in self._stacks.values()}
        with_grad = [p for p in model.parameters() if p.grad is not None]
        norm = get_total_norm([g[:1] if id(p) in stacks else g for p in with_grad if (g := p.grad) is not None])
        clip_grads_with_norm_(with_grad, max_norm, norm)
        return norm

    def _clip_cycle(self, max_norm: float) -> Tensor:
        self._trainer.accelerator.unscale_gradients()
        base = [p for p in self._base.values() if p.grad is not None]
        stacks = [p for p in self._stacks.values() if p.grad is not None]
        factors = self.cycle.member_factors()
        if factors is not None:
            for gradient in _gradients(stacks):
                gradient.mul_(rows_like(gradient, factors))
        # The gradients are sums over the members of those of each one's mean loss.
        members = self._late_phase.num_members
        base_norm, member_norm = _norm(base) / members, _norm(stacks) / members
        norm = torch.hypot(base_norm, member_norm)
        clip_grads_with_norm_([*base, *stacks], max_norm * members, norm * members)
        self._monitor.gradient_norms = (base_norm, member_norm)
        return norm

    def before_optimizer(self) -> None:
        """Scales the base gradients and keeps members that saw no minibatch as they are."""
        if not (self._late_phase.released and self._trainer.accelerator.sync_gradients):
            return
        gradients = _gradients(self._scaled)
        if gradients and self.base_gradient_scale != 1:  # weights=["full"] leaves no base
            torch._foreach_mul_(gradients, self.base_gradient_scale)
        absent = self.cycle.absent() if self.in_cycles else []
        if absent:
            stacks: list[Tensor] = list(self._stacks.values())
            rows = [float(member in absent) for member in range(self._late_phase.num_members)]
            masks = [rows_like(stack, rows).bool() for stack in stacks]
            self._frozen = FrozenMembers(self._trainer.optimizer, stacks, masks)

    def after_optimizer(self) -> None:
        """Ends the cycle, or holds its gradients until the next step."""
        if self._frozen is not None:
            self._frozen.restore()
            self._frozen = None
        if not self.in_cycles:
            return
        self._statistics.synchronise()
        if self._trainer.accelerator.sync_gradients:
            self.cycle.reset()
        else:
            self.cycle.step += 1
            self._hold_gradients()

    # ---- holding gradients ----

    def drop_held(self) -> None:
        """Forgets the gradients of an unfinished cycle."""
        self.held = {}

    def average_held(self) -> None:
        """
        Averages the held gradients over processes, which inside a cycle have kept their own, for a checkpoint.

        The running processes go on with the average too, so that they and a resumed run are the same to the bit.
        """
        if self.cycle.num_processes > 1:
            for gradient in self.held.values():
                if not isinstance(gradient, DTensor):
                    gradient.copy_(self._trainer.accelerator.reduce(gradient, "mean"))

    def _hold_gradients(self) -> None:
        """Takes the gradients out of reach of Trainer's `zero_grad`, without copying."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.held[name] = parameter.grad
                parameter.grad = None

    def _restore_gradients(self) -> None:
        if self.held:
            parameters = self._parameters
            for name, gradient in self.held.items():
                parameters[name].grad = gradient
            self.held = {}


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = get_total_norm(_gradients(parameters))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
