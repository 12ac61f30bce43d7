"""What is saved of a run, and how training goes on from it."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from ..compat import TrainerHooks
from ..config import LatePhaseConfig
from ..core.averaging import AverageSchedule, TimeAverage
from ..core.evaluated_weights import EvaluatedWeights
from ..core.late_phase import LatePhase
from ..core.points import PointsInTraining
from .adapter import TrainerAdapter
from .checkpoints.checkpoint import has_state
from .checkpoints.resume import Position, StateKeeper
from .checkpoints.staging import Staging, keep_only, staging_folder
from .monitor import MemberMonitor
from .stepping import Stepping


logger = logging.get_logger(__name__)


class SavingMixin(TrainerHooks):
    """The part of [`LatePhaseMixin`] that saves stock models, and checkpoints from which training goes on."""

    late_phase_config: LatePhaseConfig
    late_phase: LatePhase
    time_average: TimeAverage | None
    _adapter: TrainerAdapter
    _evaluated: EvaluatedWeights
    _monitor: MemberMonitor
    _staging: Staging
    _state_keeper: StateKeeper
    _stepping: Stepping
    # Of the training that runs, or ran last.
    _points: PointsInTraining
    _average_schedule: AverageSchedule

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the averaged model as a stock model, with the late-phase config beside it."""
        with self._evaluated.applied():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:  # a sharded model's weights are gathered on that process only
            state_dict = self.late_phase.averaged_state_dict(state_dict)
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            assert folder is not None
            self.late_phase_config.save_pretrained(folder)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return staging_folder(run_dir) if self._staging.is_writing else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        with self._staging.checkpoint(run_dir, self.state, self.args, self.accelerator) as folder:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            # Last: the upload goes through the run's folder in the background, and fails if something vanishes there.
            self._push_from_checkpoint(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging.is_writing:  # once it is whole, and has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            self._finish_current_push()
            keep_only(self._get_output_dir(trial), best)
        return super()._finalize_training(trial, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._stepping.average_held()
        position = self._position()
        self._state_keeper.save(output_dir, position, self.time_average, self.cycle, self.args.should_save)

    def _position(self) -> Position:
        """Where training stands."""
        stepping, monitor, adapter = self._stepping, self._monitor, self._adapter
        norms = None
        if stepping.grad_norm is not None and monitor.gradient_norms is not None:
            norms = (stepping.grad_norm, *monitor.gradient_norms)
        return Position(
            cycle=stepping.cycle.state_dict(),
            held=stepping.held,
            gradient_norms=norms,
            losses=self.accelerator.reduce(adapter.loss_since_log.detach().clone(), "mean"),
            member_losses=monitor.collected(),
            last_logged=adapter.last_logged,
            last_averaged=self._average_schedule.last_step,
        )

    def _go_on_from(self, position: Position) -> None:
        """Takes up training where a checkpoint's run stood."""
        stepping, monitor = self._stepping, self._monitor
        stepping.cycle.load_state_dict(position.cycle)
        stepping.held = position.held
        if position.gradient_norms is not None:
            stepping.grad_norm, *parts = position.gradient_norms
            monitor.gradient_norms = (parts[0], parts[1])
        monitor.restore(position.member_losses)
        self._adapter.go_on_logging(position.losses, position.last_logged)
        self._average_schedule.last_step = position.last_averaged

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._attach()
        saved = self._state_keeper.read(resume_from_checkpoint, self._stepping.new_cycle())
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._state_keeper.load(saved, self.time_average)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.is_deepspeed_enabled and checkpoint is not None:  # its engine has loaded the weights by now
            saved = self._state_keeper.read(checkpoint, self._stepping.new_cycle())
            self._state_keeper.load(saved, self.time_average)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        card = getattr(self.model, "model_card_data", None)
        mark_step = getattr(card, "set_best_model_step", None)
        if folder is not None and mark_step is not None:  # as sentence-transformers' trainers do here
            mark_step(self.state.best_global_step)
        if folder is None or not os.path.isdir(folder) or not has_state(folder):
            # Saved with save_only_model: its average is all there is.
            self._evaluated.forget()
            # Files that only the parent can read it loads into the attached model, which takes the stock weights.
            self._state_keeper.load_average(folder, super()._load_from_checkpoint)
            if self.time_average is not None:
                self.time_average.num_averaged = 0
            return
        logger.info(f"Loading best model from {folder} (score: {self.state.best_metric}).")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        self._evaluated.forget()
        self._state_keeper.load(self._state_keeper.read(folder), self.time_average)
        self._stepping.drop_held()
