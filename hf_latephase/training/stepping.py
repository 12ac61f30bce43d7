"""The gradient side of a cycle: what Trainer's steps do to base and members once minibatches are dealt out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.utils import logging

from ..core.cycle import Cycle
from ..core.optimizers import FrozenMembers, depends_on_gradient_scale, set_decay, start_afresh, unwrapped
from ..core.sharding import rows_like
from .process_statistics import ProcessStatistics


logger = logging.get_logger(__name__)
# The modes of torch.compile that record and replay.
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def dealt_out(training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Has a subclass's own `training_step` run with the member whose turn it is, be its parent's called or not."""

    @functools.wraps(training_step)
    def run(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        own = functools.partial(training_step, self)
        return self._stepping.run(own, model, inputs, num_items_in_batch)  # type: ignore[no-any-return]

    return run


class Stepping:
    """
    Makes a cycle of a trainer's steps: weighs losses, holds gradients until every member has its own, clips once.

    Args:
        trainer (`LatePhaseMixin`):
            The trainer, whose `cycle` says where it is.

    Attributes:
        held (`dict[str, torch.Tensor]`):
            The gradients of an unfinished cycle between two steps, by parameter name.
        grad_norm (`torch.Tensor`, *optional*):
            That of the last whole cycle, logged until the next one ends.
        base_gradient_scale (`float`):
            γ_θ, chosen by the optimizer when training begins if the config leaves it open.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
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
        """Takes stock of the parameters, which the trainer has prepared by now, and holds no gradient."""
        late_phase = self._trainer.late_phase
        self._statistics = ProcessStatistics(self._trainer)
        self._base, self._stacks = late_phase.base_parameters(), late_phase.stacks()
        self._late = late_phase.late_parameters()
        self._scaled = [parameter for name, parameter in self._base.items() if name not in self._late]
        self.base_gradient_scale = self._resolve_scale()
        cycle, steps = self._trainer.cycle, self._trainer.args.gradient_accumulation_steps
        self._unseen = not cycle.is_plain and (steps > 1 or cycle.loss_divisor != 1)
        self.drop_held()

    def _resolve_scale(self) -> float:
        config = self._trainer.late_phase_config
        if config.base_gradient_scale is not None:
            return float(config.base_gradient_scale)
        if config.num_members == 1:
            return 1.0
        optimizer = unwrapped(self._trainer.optimizer)
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
        """Returns a cycle that fits the trainer's config and arguments, at its beginning."""
        config, accelerator = self._trainer.late_phase_config, self._trainer.accelerator
        return Cycle(
            num_members=config.num_members,
            length=config.cycle_length,
            accumulation_steps=self._trainer.args.gradient_accumulation_steps,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            by_sample=config.member_assignment == "sample",
        )

    @property
    def in_cycles(self) -> bool:
        """Whether minibatches are dealt out; plain training needs nothing of it."""
        return self._trainer.late_phase.released and not self._trainer.cycle.is_plain

    @property
    def cycle_is_open(self) -> bool:
        """Whether the last step left a cycle unfinished."""
        return self.in_cycles and self._trainer.cycle.step > 0

    def release_if_due(self, start: int) -> None:
        """Begins the late phase once training has come to the step `start`."""
        trainer, late_phase = self._trainer, self._trainer.late_phase
        if late_phase.released or trainer.state.global_step < start:
            return
        self._statistics.broadcast()
        # Seeded alike on every process, and apart from the generators that training uses.
        late_phase.release(torch.Generator().manual_seed(trainer.args.seed))
        stacks = self._stacks
        optimizer = unwrapped(trainer.optimizer)
        decay = trainer.late_phase_config.member_weight_decay
        if decay is not None:
            self._decays_before = set_decay(optimizer, self._late.values(), decay)
        if late_phase.num_members == 1:
            return
        logger.info(f"Late phase begins at step {trainer.state.global_step}.\n{late_phase.summary()}")
        start_afresh(optimizer, stacks.values())  # the members' optimizers, as in the reference code
        average = trainer.weight_average
        if average is not None and average.num_averaged:
            names = [name for name in average.values if late_phase.is_late_phase(name)]
            late_phase.share_first_member([average.values[name] for name in names])

    def rejoin(self) -> None:
        """Undoes a release, for training that begins anew with the same model and optimizer."""
        self._trainer.late_phase.rejoin()
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
            self._trainer.late_phase.activate(0)
            with self._weighed_gradients(1.0):
                return training_step(model, inputs, num_items_in_batch)
        finally:
            self._is_running = False

    def _run_in_cycle(
        self, training_step: Callable[..., Tensor], model: nn.Module, inputs: Any, num_items_in_batch: Any
    ) -> Tensor:
        trainer, cycle = self._trainer, self._trainer.cycle
        self._restore_gradients()
        member = cycle.next_member()
        if cycle.by_sample:
            trainer.late_phase.activate_by_sample()
        else:
            trainer.late_phase.activate(member)
        self._statistics.count(None if cycle.by_sample else member)
        # A step of the parent's gives each minibatch one part in `steps` of the gradient, a cycle 1 / loss_divisor.
        steps = trainer.current_gradient_accumulation_steps
        weighed = self._weighed_gradients(steps / cycle.loss_divisor)
        with self._synchronised_once_a_cycle(model), self._own_mean(), weighed:
            loss = training_step(model, inputs, self._own_items(inputs, num_items_in_batch))
        if cycle.rounds == 1 and trainer.args.torch_compile_mode in CUDA_GRAPHS:
            self._copy_gradients()
        trainer._monitor.add(member, loss, steps)
        return loss

    def _copy_gradients(self) -> None:
        """Takes gradients out of the memory that the next minibatch's CUDA graph writes into."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _own_items(self, inputs: Any, num_items_in_batch: Any) -> Any:
        """What stands for Trainer's count of the targets of a whole step: that of the minibatch, if there is one."""
        trainer = self._trainer
        # Label smoothing takes the mean by itself.
        smoothed = trainer.label_smoother is not None and trainer.compute_loss_func is None
        if num_items_in_batch is None or smoothed:
            return None
        steps = trainer.current_gradient_accumulation_steps
        labels = inputs.get("shift_labels", inputs.get("labels")) if isinstance(inputs, Mapping) else None
        if not isinstance(labels, Tensor):  # counted in a way of the trainer's own
            items = num_items_in_batch / steps
        else:
            if trainer._loss_shifts_labels and "shift_labels" not in inputs:
                labels = labels[..., 1:]
            # Trainer multiplies the loss by the number of processes when it counts over all of them.
            processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
            items = labels.ne(-100).sum() * processes
        return items * steps if trainer.loss_is_scaled_for_ga else items

    @contextlib.contextmanager
    def _own_mean(self) -> Iterator[None]:
        """Has models and Trainer take the mean over the minibatch, unless a loss is on a whole step's scale anyway."""
        trainer = self._trainer
        scaled, counts = trainer.loss_is_scaled_for_ga, trainer.model_accepts_loss_kwargs
        if not scaled:
            trainer.loss_is_scaled_for_ga = trainer.model_accepts_loss_kwargs = False
        try:
            yield
        finally:
            trainer.loss_is_scaled_for_ga, trainer.model_accepts_loss_kwargs = scaled, counts

    @contextlib.contextmanager
    def _weighed_gradients(self, factor: float) -> Iterator[None]:
        """Multiplies what `accelerator.backward` gets, whoever computed and scaled the loss."""
        if factor == 1 and not self._unseen:
            yield
            return
        accelerator = self._trainer.accelerator
        backward, before = accelerator.backward, vars(accelerator).get("backward")

        def weighed(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._unseen = False
            backward(loss if factor == 1 else loss * factor, *args, **kwargs)

        accelerator.backward = weighed
        try:
            yield
        finally:
            del accelerator.backward
            if before is not None:
                accelerator.backward = before
        if self._unseen:
            raise ValueError(
                f"{type(self._trainer).__name__}.training_step runs the backward pass without "
                "self.accelerator.backward(loss), so with gradient_accumulation_steps > 1 or several processes the "
                "members' gradients cannot be weighed. Call that, or accumulate over one minibatch."
            )

    @contextlib.contextmanager
    def _synchronised_once_a_cycle(self, model: nn.Module) -> Iterator[None]:
        """Inside a cycle, keeps accelerate's optimizer from stepping and DDP from reducing gradients."""
        accelerator, state = self._trainer.accelerator, self._trainer.state
        is_last_step = state.global_step + 1 >= state.max_steps
        if accelerator.sync_gradients and not self._trainer.cycle.completes_at_next_step(is_last_step):
            accelerator.gradient_state._set_sync_gradients(False)
            with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
                yield
        else:
            yield

    # ---- one of Trainer's steps ----

    def norm_and_clip(self, model: nn.Module, max_norm: float) -> Any:
        """Returns the gradient norm of the mean loss, and clips to it, once a cycle."""
        accelerator, late_phase = self._trainer.accelerator, self._trainer.late_phase
        if self.in_cycles:
            if accelerator.sync_gradients:
                self.grad_norm = self._clip_cycle(max_norm)
            return self.grad_norm
        if late_phase.num_members == 1 or self._trainer.is_fsdp_enabled:
            return accelerator.clip_grad_norm_(model.parameters(), max_norm)
        # Idle members stay out of the norm, so that it is to the bit that of a run with one member.
        accelerator.unscale_gradients()
        stacks = {id(p) for p in self._stacks.values()}
        with_grad = [p for p in model.parameters() if p.grad is not None]
        norm = get_total_norm([g[:1] if id(p) in stacks else g for p in with_grad if (g := p.grad) is not None])
        clip_grads_with_norm_(with_grad, max_norm, norm)
        return norm

    def _clip_cycle(self, max_norm: float) -> Tensor:
        late_phase = self._trainer.late_phase
        self._trainer.accelerator.unscale_gradients()
        base = [p for p in self._base.values() if p.grad is not None]
        stacks = [p for p in self._stacks.values() if p.grad is not None]
        factors = self._trainer.cycle.member_factors()
        if factors is not None:
            for gradient in _gradients(stacks):
                gradient.mul_(rows_like(gradient, factors))
        # The gradients are sums over the members of those of each one's mean loss.
        members = late_phase.num_members
        base_norm, member_norm = _norm(base) / members, _norm(stacks) / members
        norm = torch.hypot(base_norm, member_norm)
        clip_grads_with_norm_([*base, *stacks], max_norm * members, norm * members)
        self._trainer._monitor.gradient_norms = (base_norm, member_norm)
        return norm

    def before_optimizer(self) -> None:
        """Scales the base gradients and keeps members that saw no minibatch as they are."""
        trainer, late_phase = self._trainer, self._trainer.late_phase
        if not (late_phase.released and trainer.accelerator.sync_gradients):
            return
        gradients = _gradients(self._scaled)
        if gradients and self.base_gradient_scale != 1:  # weights=["full"] leaves no base
            torch._foreach_mul_(gradients, self.base_gradient_scale)
        absent = trainer.cycle.absent() if self.in_cycles else []
        if absent:
            self._frozen = FrozenMembers(unwrapped(trainer.optimizer), list(self._stacks.values()), absent)

    def after_optimizer(self) -> None:
        """Ends the cycle, or holds its gradients until the next step."""
        if self._frozen is not None:
            self._frozen.restore()
            self._frozen = None
        if not self.in_cycles:
            return
        self._statistics.synchronise()
        if self._trainer.accelerator.sync_gradients:
            self._trainer.cycle.reset()
        else:
            self._trainer.cycle.step += 1
            self._hold_gradients()

    # ---- holding gradients ----

    def drop_held(self) -> None:
        """Forgets the gradients of an unfinished cycle."""
        self.held = {}

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
