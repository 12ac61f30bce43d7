"""Tells a trainer of the points in Trainer's loop that no method of it marks."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..compat import LOOP_HAS_HOOKS


class LatePhaseCallback(TrainerCallback):
    """
    Tells the trainer of the points in Trainer's loop that no method of it marks.

    Args:
        trainer (`LatePhaseMixin`):
            The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begins training, once everything is prepared."""
        self._trainer._begin_training()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begins the late phase if it is due."""
        self._trainer._begin_step()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Scales the base gradients."""
        if not LOOP_HAS_HOOKS:
            self._trainer._norm_without_clipping()
        self._trainer._stepping.before_optimizer()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Ends the cycle, or holds its gradients."""
        self._trainer._stepping.after_optimizer()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Takes the weights into their average over time."""
        self._trainer._end_step()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Ends training."""
        self._trainer._end_training()

    def on_push_begin(self, *args: Any, **kwargs: Any) -> None:
        """Completes what is about to be uploaded."""
        self._trainer._publishing.begin()
