"""Late-phase training through transformers' Trainer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..compat import LOOP_HAS_HOOKS, warn_of_untested
from ..config import LatePhaseConfig
from ..core.averaging import AverageSchedule
from ..core.cycle import Cycle
from ..core.ensemble import MemberTable
from ..core.optimizers import check_trained, unwrapped
from ..core.points import resolve_points
from ..publishing.hub import Publishing, PublishingMixin
from .adapter import TrainerAdapter
from .callback import LatePhaseCallback
from .checkpoints.checkpoint import last_whole_checkpoint
from .checkpoints.staging import Staging, clear
from .lending import LendingMixin
from .plan import announce, make_plan
from .raw_evaluation import tell_which_was_better, with_suffix
from .saving import SavingMixin
from .support import check_supported
from .training_statistics import generators_kept
from .zero import MasterWeights


logger = logging.get_logger(__name__)


class LatePhaseMixin(LendingMixin, SavingMixin, PublishingMixin):
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

    Attributes:
        control_results (`dict[str, dict[str, float]]`):
            Figures of controls by name, as their trainers' `evaluate()` returned them. The model card compares.

    Raises:
        `ValueError`: If the model, the arguments or the distributed backend cannot train these late-phase weights.
    """

    _first_figures: dict[str, float]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "training_step" in vars(cls):
            cls.training_step = _dealt_out(cls.training_step)  # type: ignore[method-assign]

    def __init__(self, *args: Any, late_phase_config: LatePhaseConfig | None = None, **kwargs: Any) -> None:
        self.late_phase_config = late_phase_config or LatePhaseConfig()
        self.control_results: dict[str, dict[str, float]] = {}
        self._adapter = TrainerAdapter(self)  # type: ignore[arg-type]  # a Trainer, with what comes behind
        self._staging = Staging()
        self._publishing = Publishing(self)  # type: ignore[arg-type]
        super().__init__(*args, **kwargs)
        warn_of_untested()
        check_supported(self._adapter, self.late_phase_config)
        if self.model_init is None:
            assert self.model is not None
            self._take(self.model)
        # Before the user's callbacks, which then see the averaged weights once a step is over.
        points_in_the_loop = LatePhaseCallback(
            begin_training=self._begin_training,
            begin_step=self._begin_step,
            before_optimizer=self._before_optimizer,
            after_optimizer=self._after_optimizer,
            end_step=self._end_step,
            end_training=self._end_training,
            begin_push=self._publishing.begin,
        )
        self.callback_handler.callbacks.insert(0, points_in_the_loop)

    @property
    def cycle(self) -> Cycle:
        """Where training stands in its cycle, once it has begun."""
        return self._stepping.cycle

    # ---- the cycle ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Runs the parent's training. `resume_from_checkpoint=True` takes the last whole checkpoint in `output_dir`.

        Members are in the model while this runs. However it ends, the model is then the stock model that `evaluate()`
        scores and `save_model()` writes: the same object, averaged. (With FSDP2 it stays sharded and attached, and
        computes with the average.)

        Raises:
            `FileNotFoundError`, `ValueError`: If training cannot go on from the checkpoint; nothing is changed then.
        """
        assert self.args.output_dir is not None  # TrainingArguments has filled it in
        self._state_keeper.forget()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        interrupted = True
        try:
            if resume_from_checkpoint and self.model_init is None:
                with self.late_phase.attached():
                    self._state_keeper.check(str(resume_from_checkpoint), self._stepping.new_cycle())
            clear(self.args.output_dir, self.args)
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            interrupted = False
        finally:
            self._give_back(interrupted)
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._attach()
        return super()._inner_training_loop(*args, **kwargs)

    def _begin_training(self) -> None:
        """Resolves the points in training and refuses those that lie outside of it, before the first step."""
        self._points = resolve_points(self.late_phase_config, self.state.max_steps)
        if isinstance(self.late_phase.storage, MasterWeights):
            self.late_phase.storage.is_linked = True
        self._stepping.begin_training()
        self._average_schedule = AverageSchedule(self._points, self.state.global_step)
        self._monitor.reset()
        self._evaluated.forget()
        if not self.is_deepspeed_enabled:  # whose engine has put its own tensors in their place
            check_trained(unwrapped(self.optimizer), self.late_phase.stacks())
        position = self._state_keeper.resume(self.state.global_step, self.args.device)
        if position is not None:
            self._go_on_from(position)
        else:
            # Training begins anew, after one that ran out of memory or with a sharded model that stayed attached.
            self.time_average = self._new_average()
            self._evaluated = self._new_view()
            if self.late_phase.released:
                self._stepping.rejoin()
        plan = make_plan(
            self.late_phase_config,
            self.cycle,
            self._points,
            self.state.max_steps,
            self.args.gradient_accumulation_steps,
            self._stepping.base_gradient_scale,
        )
        self.late_phase.plan = plan.text
        self._first_figures = announce(plan, self.state, self.args)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed after its last save has no step left, of which Trainer would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _begin_step(self) -> None:
        self._evaluated.forget()
        self._stepping.release_if_due(self._points.late_phase_start, self.time_average)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Runs the parent's step with the member whose turn it is, its gradient weighed as the cycle asks."""
        return self._stepping.run(super().training_step, model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: Any) -> int:
        """Counts those of the plain model: a minibatch passes through one member, however many there are."""
        main_input = getattr(self.model, "main_input_name", "input_ids")
        tokens = inputs.get(main_input) if isinstance(inputs, Mapping) else None
        if self._plain_size is None or not isinstance(tokens, Tensor):
            return 0
        return int(6 * tokens.numel() * self._plain_size)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._stepping.norm_and_clip(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return grad_norm if grad_norm is not None else self._stepping.norm_and_clip(model, float("inf"))

    def _before_optimizer(self) -> None:
        if not LOOP_HAS_HOOKS:
            self._norm_without_clipping()
        self._stepping.before_optimizer()

    def _after_optimizer(self) -> None:
        self._stepping.after_optimizer()

    def _end_step(self) -> None:
        self.late_phase.rest()
        if self.time_average is not None and not self._stepping.cycle_is_open:
            self._average_schedule.sample(self.time_average, self.state.global_step)

    def _end_training(self) -> None:
        self._stepping.drop_held()
        self._state_keeper.forget()
        self.late_phase.rest()
        tell_which_was_better(self.state.log_history, self.args)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the phase, the members' losses and distance, and the gradient norms to Trainer's training logs."""
        if self.is_in_train and "loss" in logs and "learning_rate" in logs and not self.cycle.is_plain:
            logs.update(self._monitor.summary() | self._first_figures)
            self._first_figures = {}
        if self.is_in_train and self.time_average is not None:
            self.time_average.warn_of_samples_left_out()
        super().log(logs, *args, **kwargs)

    # ---- evaluating ----

    def averaged_model(self, time_averaged: bool = True) -> nn.Module:
        """
        Returns a new stock model with the averaged weights.

        Args:
            time_averaged (`bool`, defaults to `True`):
                Whether to use the average over time too, if the config asks for SWA or EMA and one was collected.
        """
        with self._evaluated.applied(time_averaged):
            averaged = self.late_phase.averaged_model()
        # Without what mixed precision has wrapped around its call.
        stock: nn.Module = self.accelerator.unwrap_model(averaged, keep_fp32_wrapper=False)
        return stock

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the parent's loop with the averaged weights, or what `evaluate_members` looks at."""
        if self.is_fsdp_enabled:
            self._attach()  # the parent is about to shard the model
        members = self.late_phase.averaged() if self.late_phase.is_attached else contextlib.nullcontext()
        with self._evaluated.applied(), members:
            self._member_evaluation.select_member()
            output: Any = super().evaluation_loop(*args, **kwargs)
        is_own = kwargs.get("description") == "Evaluation"
        if is_own and self.late_phase_config.evaluate_raw and self._evaluated.has_average:
            # Within the loop, so that both are logged in one entry.
            with (
                generators_kept(self.args.device),
                self._evaluated.applied(time_averaged=False),
                self.late_phase.averaged(),
            ):
                raw: Any = super().evaluation_loop(*args, **kwargs)
            output.metrics.update(with_suffix(raw.metrics))
        return output

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
        dataloader, prefix = self.get_eval_dataloader(eval_dataset), f"{metric_key_prefix}_"

        def evaluate(name: str) -> dict[str, float]:
            output = self.evaluation_loop(
                dataloader,
                description=f"Evaluation of {name}",
                prediction_loss_only=self.compute_metrics is None,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
            return {key.removeprefix(prefix): value for key, value in output.metrics.items()}

        table = self._member_evaluation.run(evaluate)
        self.log(table.summary(metric_key_prefix))
        if self.is_world_process_zero():
            logger.info(f"Members, average and ensemble:\n{table}")
        return table

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Runs the parent's step; within `evaluate_members` the loss is the likelihood of the labels."""
        if not self._member_evaluation.is_running:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        step = functools.partial(super().prediction_step, model, inputs, False, ignore_keys)
        loss, logits, labels = self._member_evaluation.predict(step)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)


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


def _dealt_out(training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Has a subclass's own `training_step` run with the member whose turn it is, be its parent's called or not."""

    @functools.wraps(training_step)
    def run(self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        own = functools.partial(training_step, self)
        return self._stepping.run(own, model, inputs, num_items_in_batch)  # type: ignore[no-any-return]

    return run
