"""Late-phase training through transformers' Trainer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .averaging import WeightAverage
from .checkpoint import has_state, last_whole_checkpoint
from .config import LatePhaseConfig, steps_at
from .cycle import Cycle
from .ensemble import MemberTable, ensemble_log_probs, negative_log_likelihood
from .late_phase import LatePhase, rows_like
from .monitor import MemberMonitor
from .optimizers import FrozenMembers, check_elementwise
from .resume import StateKeeper
from .staging import Staging, keep_only, staging_folder
from .support import check_adapter, check_supported


logger = logging.get_logger(__name__)


class LatePhaseMixin:
    """
    Gives a [`~transformers.Trainer`] class late-phase weights: `class MyTrainer(LatePhaseMixin, Seq2SeqTrainer)`.

    What differs from the parent:

    - From `late_phase_start` on, minibatches are dealt out to K members and base and members step once a cycle (see
      [`Cycle`]). Each minibatch's loss is its own mean, whatever `num_items_in_batch` says. Steps, epochs, logging and
      the learning-rate schedule count as before.
    - `max_grad_norm` clips once a cycle. It is compared with the norm of the gradient of the cycle's mean loss with
      respect to base and members together, so a value that fits plain training keeps its meaning; `grad_norm` is that.
    - Outside of a training step the model computes with the averaged weights: evaluation, prediction, the choice of
      the best model, callbacks. With SWA or EMA, evaluation and saving use the average over time.
    - Saved models are stock models; checkpoints hold the members besides.
    - An unfinished cycle at the last step is applied with the members that it has. If training is stopped before
      `max_steps`, the gradients of the unfinished cycle are dropped.

    Args:
        late_phase_config ([`LatePhaseConfig`], *optional*):
            The settings; the defaults if left out. All other arguments are the parent's.

    Raises:
        `ValueError`: If the model, the arguments or the distributed backend cannot train these late-phase weights.
    """

    late_phase: LatePhase

    def __init__(self, *args: Any, late_phase_config: LatePhaseConfig | None = None, **kwargs: Any) -> None:
        self.late_phase_config = late_phase_config or LatePhaseConfig()
        self._staging = Staging(self)
        super().__init__(*args, **kwargs)
        check_supported(self, self.late_phase_config)
        if self.model_init is None:
            self._attach(self.model)
        # Before the user's callbacks, which then see the averaged weights once a step is over.
        self.callback_handler.callbacks.insert(0, _LatePhaseCallback(self))

    # ---- attaching ----

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Attaches late-phase weights to every model that `model_init` makes."""
        model = super().call_model_init(trial)
        self._attach(model)
        return model

    def _attach(self, model: nn.Module) -> None:
        check_adapter(model, self.late_phase_config, self.args)
        # Weight decay goes by the names and types of the plain model, which parametrizations hide.
        self._decaying = set(super().get_decay_parameter_names(model))
        self.late_phase = LatePhase(model, self.late_phase_config)
        self.late_phase.activate(None)
        self.weight_average = self._new_average()
        self._held: dict[str, Tensor] = {}
        self._frozen: FrozenMembers | None = None
        self._grad_norm: Tensor | None = None
        self._state_keeper = StateKeeper(self)
        self._monitor = MemberMonitor(self)
        self._viewpoint: int | str | None = None

    def _new_average(self) -> WeightAverage | None:
        config = self.late_phase_config
        if config.swa_start is None and config.ema_decay is None:
            return None
        return WeightAverage(self.late_phase.model, config.ema_decay)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names the parameters that decay: those of the plain model, replicated or not. Rank-1 factors never do."""
        plain = {name: self.late_phase.plain_name(name) for name, _ in model.named_parameters()}
        return [name for name, plain_name in plain.items() if plain_name in self._decaying]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Creates the parent's optimizer and refuses one that would mix the members."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.late_phase.num_members > 1:
            check_elementwise(getattr(optimizer, "optimizer", optimizer))
        return optimizer

    # ---- the cycle ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Runs the parent's training. `resume_from_checkpoint=True` takes the last whole checkpoint in `output_dir`.

        Raises:
            `FileNotFoundError`, `ValueError`: If training cannot go on from the checkpoint; nothing is changed then.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        if resume_from_checkpoint and self.model_init is None:
            self._state_keeper.check(str(resume_from_checkpoint))
        self._staging.clear(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _begin_training(self) -> None:
        """Resolves the points in training and refuses those that lie outside of it, before the first step."""
        config, max_steps = self.late_phase_config, self.state.max_steps
        self._start = steps_at(config.late_phase_start, max_steps)
        if self._start >= max_steps:
            raise ValueError(
                f"late_phase_start={config.late_phase_start} is step {self._start}, but training ends at step "
                f"{max_steps}: the late phase would never begin. Lower it, or train longer."
            )
        if config.swa_start is not None:
            self._swa_start = steps_at(config.swa_start, max_steps)
            self._swa_every = steps_at(config.swa_every or 1, max_steps)
            if self.late_phase.num_members > 1 and self._swa_start < self._start:
                raise ValueError(
                    f"swa_start={config.swa_start} is step {self._swa_start}, before late_phase_start="
                    f"{config.late_phase_start}, step {self._start}. Start SWA at T0 or later."
                )
            if self._swa_start > max_steps:
                raise ValueError(
                    f"swa_start={config.swa_start} is step {self._swa_start}, but training ends at step {max_steps}."
                )
        self.cycle = self._new_cycle()
        self._held = {}
        self._last_averaged = self.state.global_step
        self._monitor.reset()
        if not self._state_keeper.resume():
            self.weight_average = self._new_average()
            if self.late_phase.released:
                self.late_phase.rejoin()

    def _new_cycle(self) -> Cycle:
        config = self.late_phase_config
        return Cycle(
            num_members=config.num_members,
            length=config.cycle_length,
            accumulation_steps=self.args.gradient_accumulation_steps,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            by_sample=config.member_assignment == "sample",
        )

    @property
    def _in_cycles(self) -> bool:
        """Whether minibatches are dealt out; plain training needs nothing of it."""
        return self.late_phase.released and not self.cycle.is_plain

    def _release_if_due(self) -> None:
        if self.late_phase.released or self.state.global_step < self._start:
            return
        # Seeded alike on every process, and apart from the generators that training uses.
        self.late_phase.release(torch.Generator().manual_seed(self.args.seed))
        if self.late_phase.num_members == 1:
            return
        logger.info(f"Late phase begins at step {self.state.global_step}: {self.late_phase.num_members} members.")
        stacks = self.late_phase.stacks()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        for stack in stacks.values():
            # As in the reference code, the members' optimizers start fresh.
            optimizer.state.pop(stack, None)
        if self.weight_average is not None and self.weight_average.num_averaged:
            self.late_phase.share_first_member([self.weight_average.values[name] for name in stacks])

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Runs the parent's step with the member whose turn it is, its loss weighed as the cycle asks."""
        if not self._in_cycles:
            self.late_phase.activate(0)
            return super().training_step(model, inputs, num_items_in_batch)
        self._restore_gradients()
        member = self.cycle.next_member()
        if self.cycle.by_sample:
            self.late_phase.activate_by_sample()
        else:
            self.late_phase.activate(member)
        with self._synchronised_once_a_cycle(model), self._weighed_loss() as divisor:
            loss = super().training_step(model, inputs, self._own_items(inputs))
        self._monitor.add(member, loss, divisor)
        # On Trainer's scale: the losses of a step add up to their mean.
        return loss * (divisor / self.current_gradient_accumulation_steps)

    def _own_items(self, inputs: dict[str, Any]) -> Tensor | None:
        """Counts a minibatch's own targets for `compute_loss_func`; a model averages over them by itself."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if self.compute_loss_func is None or not isinstance(labels, Tensor):
            return None
        if self._loss_shifts_labels and "shift_labels" not in inputs:
            labels = labels[..., 1:]
        # Trainer multiplies the loss by the number of processes when it counts over all of them.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return labels.ne(-100).sum() * processes

    @contextlib.contextmanager
    def _weighed_loss(self) -> Iterator[float]:
        """Lets the parent divide each minibatch's mean loss by the cycle's divisor, whoever computed the loss."""
        steps, scaled = self.current_gradient_accumulation_steps, self.loss_is_scaled_for_ga
        self.current_gradient_accumulation_steps = self.cycle.loss_divisor
        self.loss_is_scaled_for_ga = False
        try:
            yield self.cycle.loss_divisor
        finally:
            self.current_gradient_accumulation_steps, self.loss_is_scaled_for_ga = steps, scaled

    @contextlib.contextmanager
    def _synchronised_once_a_cycle(self, model: nn.Module) -> Iterator[None]:
        """Inside a cycle, keeps accelerate's optimizer from stepping and DDP from reducing gradients."""
        if self.accelerator.sync_gradients and not self._completes_cycle():
            self.accelerator.gradient_state._set_sync_gradients(False)
            with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
                yield
        else:
            yield

    def _completes_cycle(self) -> bool:
        return self.cycle.completes_at_next_step(self.state.global_step + 1 >= self.state.max_steps)

    def _hold_gradients(self) -> None:
        """Takes the gradients out of reach of Trainer's `zero_grad`, without copying."""
        for name, parameter in self.late_phase.model.named_parameters():
            if parameter.grad is not None:
                self._held[name] = parameter.grad
                parameter.grad = None

    def _restore_gradients(self) -> None:
        if self._held:
            parameters = dict(self.late_phase.model.named_parameters())
            for name, gradient in self._held.items():
                parameters[name].grad = gradient
            self._held = {}

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._norm_and_clip(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return grad_norm if grad_norm is not None else self._norm_and_clip(model, float("inf"))

    def _norm_and_clip(self, model: nn.Module, max_norm: float) -> Any:
        """Returns the gradient norm of the mean loss, and clips to it, once a cycle."""
        if self._in_cycles:
            if self.accelerator.sync_gradients:
                self._grad_norm = self._clip_cycle(max_norm)
            return self._grad_norm
        if self.late_phase.num_members == 1 or self.is_fsdp_enabled:
            return self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        # Idle members stay out of the norm, so that it is to the bit that of a run with one member.
        self.accelerator.unscale_gradients()
        stacks = {id(p) for p in self.late_phase.stacks().values()}
        with_grad = [p for p in model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad[:1] if id(p) in stacks else p.grad for p in with_grad])  # type: ignore[index]
        clip_grads_with_norm_(with_grad, max_norm, norm)
        return norm

    def _clip_cycle(self, max_norm: float) -> Tensor:
        self.accelerator.unscale_gradients()
        base = [p for p in self.late_phase.base_parameters().values() if p.grad is not None]
        stacks = [p for p in self.late_phase.stacks().values() if p.grad is not None]
        factors = self.cycle.member_factors()
        if factors is not None:
            for stack in stacks:
                assert stack.grad is not None
                stack.grad.mul_(rows_like(stack.grad, factors))
        # The gradients are sums over the members of those of each one's mean loss.
        members = self.late_phase.num_members
        base_norm, member_norm = _norm(base) / members, _norm(stacks) / members
        norm = torch.hypot(base_norm, member_norm)
        clip_grads_with_norm_([*base, *stacks], max_norm * members, norm * members)
        self._monitor.gradient_norms = (base_norm, member_norm)
        return norm

    def _before_optimizer(self) -> None:
        if not (self.late_phase.released and self.accelerator.sync_gradients):
            return
        scale = self.late_phase_config.base_gradient_scale
        if scale != 1:
            gradients = [p.grad for p in self.late_phase.base_parameters().values() if p.grad is not None]
            torch._foreach_mul_(gradients, scale)
        absent = self.cycle.absent() if self._in_cycles else []
        if absent:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            self._frozen = FrozenMembers(optimizer, list(self.late_phase.stacks().values()), absent)

    def _after_optimizer(self) -> None:
        if self._frozen is not None:
            self._frozen.restore()
            self._frozen = None
        if not self._in_cycles:
            return
        if self.accelerator.sync_gradients:
            self.cycle.reset()
        else:
            self.cycle.step += 1
            self._hold_gradients()

    def _end_step(self) -> None:
        self.late_phase.activate(None)
        step, average = self.state.global_step, self.weight_average
        if average is None or (self._in_cycles and self.cycle.step):
            return
        steps = step - self._last_averaged
        if average.ema_decay is not None:
            average.update(steps)
        elif step < self._swa_start or (average.num_averaged and steps < self._swa_every):
            return
        else:
            average.update()
        self._last_averaged = step

    def _end_training(self) -> None:
        self._held = {}
        self.late_phase.activate(None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the phase, the members' losses and distance, and the gradient norms to Trainer's training logs."""
        if self.is_in_train and "loss" in logs and "learning_rate" in logs and not self.cycle.is_plain:
            logs.update(self._monitor.summary())
        super().log(logs, *args, **kwargs)

    # ---- evaluating ----

    @contextlib.contextmanager
    def _time_averaged(self) -> Iterator[None]:
        with self.weight_average.applied() if self.weight_average is not None else contextlib.nullcontext():
            yield

    def averaged_model(self, time_averaged: bool = True) -> nn.Module:
        """
        Returns a new stock model with the averaged weights.

        Args:
            time_averaged (`bool`, defaults to `True`):
                Whether to use the average over time too, if the config asks for SWA or EMA and one was collected.
        """
        with self._time_averaged() if time_averaged else contextlib.nullcontext():
            return self.late_phase.averaged_model()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the parent's loop with the averaged weights, or what `evaluate_members` looks at."""
        with self._time_averaged(), self.late_phase.averaged():
            if isinstance(self._viewpoint, int):
                self.late_phase.activate(self._viewpoint)
            return super().evaluation_loop(*args, **kwargs)

    def evaluate_members(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> MemberTable:
        """
        Evaluates each member, the averaged model and the ensemble (mean of the members' predicted probabilities).

        Args:
            eval_dataset, ignore_keys, metric_key_prefix:
                As in [`~transformers.Trainer.evaluate`].

        Returns:
            [`MemberTable`]: A dictionary with a row for each; prints as a table. `loss` is the mean negative
            log-likelihood of the labels in nats, whatever loss the model trains with; the other columns are those of
            `compute_metrics`, which gets the ensemble's log-probabilities as logits.

        Raises:
            `ValueError`: If the dataset has no integer labels, so that there is no probability to average.
        """
        dataloader = self.get_eval_dataloader(eval_dataset)
        viewpoints: list[int | str] = [*range(self.late_phase.num_members), "average", "ensemble"]
        table = MemberTable()
        try:
            for viewpoint in viewpoints:
                self._viewpoint = viewpoint
                name = f"member_{viewpoint}" if isinstance(viewpoint, int) else viewpoint
                metrics = self.evaluation_loop(
                    dataloader,
                    description=f"Evaluation of {name}",
                    prediction_loss_only=self.compute_metrics is None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=metric_key_prefix,
                ).metrics
                prefix = f"{metric_key_prefix}_"
                table[name] = {k.removeprefix(prefix): v for k, v in metrics.items() if "model_preparation" not in k}
        finally:
            self._viewpoint = None
        self.log(table.summary(metric_key_prefix))
        if self.is_world_process_zero():
            logger.info(f"Members, average and ensemble:\n{table}")
        return table

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Runs the parent's step; within `evaluate_members` the loss is the likelihood of the labels."""
        if self._viewpoint is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        labels: Any = None

        def predict() -> Tensor:
            nonlocal labels
            _, logits, labels = super(LatePhaseMixin, self).prediction_step(model, inputs, False, ignore_keys)
            if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
                raise ValueError(
                    "evaluate_members() compares predicted probabilities and needs one logits tensor and integer "
                    "labels; this model or dataset gives others. Use evaluate()."
                )
            return logits

        logits = ensemble_log_probs(self.late_phase, predict) if self._viewpoint == "ensemble" else predict()
        loss = negative_log_likelihood(logits, labels, shift=self._loss_shifts_labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    # ---- saving and resuming ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the averaged model as a stock model, with the late-phase config beside it."""
        with self._time_averaged():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:  # a sharded model's weights are gathered on that process only
            state_dict = self.late_phase.averaged_state_dict(state_dict)
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            self.late_phase_config.save_pretrained(output_dir or self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return staging_folder(run_dir) if self._staging.is_writing else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._staging.checkpoint(self._get_output_dir(trial)):
            super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging.is_writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            keep_only(self._get_output_dir(trial), best)
        return super()._finalize_training(trial, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._state_keeper.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = self._state_keeper.read(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._state_keeper.load(saved)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if folder is None or not os.path.isdir(folder) or not has_state(folder):
            # Saved with save_only_model: its average is all there is.
            self._state_keeper.load_average(folder)
            return
        logger.info(f"Loading best model from {folder} (score: {self.state.best_metric}).")
        if self.is_fsdp_enabled:
            super()._load_best_model()
        self._state_keeper.load(self._state_keeper.read(folder, to_train=False))
        self._held = {}


class LatePhaseTrainer(LatePhaseMixin, Trainer):
    """
    [`~transformers.Trainer`] with late-phase weights; see [`LatePhaseMixin`] for what differs.

    Example:

    ```python
    from hf_latephase import LatePhaseConfig, LatePhaseTrainer

    trainer = LatePhaseTrainer(
        model=model,
        args=TrainingArguments("out", gradient_accumulation_steps=10),
        late_phase_config=LatePhaseConfig(num_members=10, weights=["norm"]),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    trainer.train()
    trainer.save_model("out")  # AutoModelForCausalLM.from_pretrained("out") needs no hf_latephase
    ```
    """


class _LatePhaseCallback(TrainerCallback):
    """Tells the trainer of the points in Trainer's loop that no method of it marks."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._begin_training()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._release_if_due()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._before_optimizer()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._after_optimizer()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._end_step()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._end_training()


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
