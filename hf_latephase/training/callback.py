"""Calls what belongs to the points in Trainer's loop that no method of it marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class LatePhaseCallback(TrainerCallback):
    """
    Calls a function at each of the points that the late phase needs.

    Args:
        begin_training (`Callable[[], None]`):
            Called once everything is prepared.
        begin_step (`Callable[[], None]`):
            Called before the first minibatch of a step.
        before_optimizer (`Callable[[], None]`), after_optimizer (`Callable[[], None]`):
            Called before and after the optimizer's step, whether or not it is taken.
        end_step (`Callable[[], None]`):
            Called at the end of a step, before anything is logged, evaluated or saved.
        end_training (`Callable[[], None]`):
            Called after the last step, when the best model is loaded.
        begin_push (`Callable[[], None]`):
            Called before a checkpoint's model is uploaded.
    """

    def __init__(
        self,
        begin_training: Callable[[], None],
        begin_step: Callable[[], None],
        before_optimizer: Callable[[], None],
        after_optimizer: Callable[[], None],
        end_step: Callable[[], None],
        end_training: Callable[[], None],
        begin_push: Callable[[], None],
    ) -> None:
        self._begin_training = begin_training
        self._begin_step = begin_step
        self._before_optimizer = before_optimizer
        self._after_optimizer = after_optimizer
        self._end_step = end_step
        self._end_training = end_training
        self._begin_push = begin_push

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begins training."""
        self._begin_training()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begins a step."""
        self._begin_step()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Comes before the optimizer."""
        self._before_optimizer()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Comes after the optimizer."""
        self._after_optimizer()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Ends a step."""
        self._end_step()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Ends training."""
        self._end_training()

    def on_push_begin(self, *args: Any, **kwargs: Any) -> None:
        """Comes before an upload."""
        self._begin_push()
