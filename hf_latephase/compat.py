"""
All that depends on a release of transformers, torch or huggingface_hub, from transformers 4.56.2 and torch 2.6 on.

Each piece names the floor with which it can go.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_utils import HubStrategy


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

# ---- models ----

# What models call their memory of the text. transformers 5.24: `cache`.
STATE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def state_name(model: nn.Module) -> str:
    """What a model calls its memory: as its release of transformers does, unless its code is older."""
    parameters = inspect.signature(model.forward).parameters
    return "past_key_values" if "past_key_values" in parameters and "cache" not in parameters else STATE_NAME


# ---- Trainer ----


@contextlib.contextmanager
def mean_losses(trainer: Any) -> Iterator[None]:
    """
    Context in which Trainer divides every loss by `current_gradient_accumulation_steps`, whoever computed it.

    transformers 5.19: `loss_is_scaled_for_ga = False`. Before, it divides all but those of `compute_loss_func`.
    """
    if hasattr(Trainer, "loss_is_scaled_for_ga"):
        scaled, trainer.loss_is_scaled_for_ga = trainer.loss_is_scaled_for_ga, False
        try:
            yield
        finally:
            trainer.loss_is_scaled_for_ga = scaled
    elif trainer.compute_loss_func is None:
        yield
    else:
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: (
            compute_loss(*args, **kwargs) / trainer.current_gradient_accumulation_steps
        )
        try:
            yield
        finally:
            del trainer.compute_loss


HAS_LOOP_HOOKS = hasattr(Trainer, "_run_epoch")


class _LoopHooks(_Base):
    """Calls the hooks of Trainer's newer loop from the older one, which is a single method. transformers 5.3."""

    _loss_since_log: Tensor
    _trial: Any = None
    _sync_gradients = True

    def _inner_training_loop(self, batch_size: Any = None, args: Any = None, **kwargs: Any) -> Any:
        self.accelerator.clip_grad_norm_ = lambda *_: self._with_own_norm(self._clip_grad_norm)
        try:
            return super()._inner_training_loop(batch_size, args, **kwargs)
        finally:
            del self.accelerator.clip_grad_norm_
            vars(self).pop("training_step", None)

    def _with_own_norm(self, hook: Callable[[nn.Module], Any]) -> Any:
        # The loop has set this since training_step.
        self.accelerator.gradient_state._set_sync_gradients(self._sync_gradients)
        redirected = vars(self.accelerator).pop("clip_grad_norm_")
        try:
            return hook(self.model_wrapped)
        finally:
            self.accelerator.clip_grad_norm_ = redirected

    def _norm_without_clipping(self) -> None:
        if not self.args.max_grad_norm:
            self._with_own_norm(self._get_grad_norm)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._sync_gradients = self.accelerator.sync_gradients
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step < self.state.max_steps:
            return super().get_batch_samples(*args, **kwargs)
        self.control.should_training_stop = True
        return [], None

    @property
    def _tr_loss(self) -> Tensor:
        return self._loss_since_log

    @_tr_loss.setter
    def _tr_loss(self, carried: Tensor) -> None:
        self._loss_since_log = carried

        # The loop's own sum is a local variable, zero by now: its first term brings the rest along.
        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            del self.training_step
            loss = self.training_step(*args, **kwargs)
            return carried + loss if torch.isfinite(loss) else loss

        self.training_step = training_step

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._loss_since_log, self._trial = tr_loss, args[2]
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _sorted_checkpoints(self, *args: Any, **kwargs: Any) -> list[str]:
        if not self.is_in_train:  # asked for by the end of the loop, which deletes all but the best
            self._finalize_training(self._trial)
        return super()._sorted_checkpoints(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any) -> None:
        pass


class _PushHook(_Base):
    """Calls `on_push_begin` before an upload in the background. transformers 5.0."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        is_free = self.push_in_progress is None or self.push_in_progress.is_done() or self.args.hub_always_push
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and is_free:
            for callback in self.callback_handler.callbacks:
                if hasattr(callback, "on_push_begin"):
                    callback.on_push_begin(self.args, self.state, self.control)
        super()._push_from_checkpoint(checkpoint_folder)


class TrainerHooks(
    *([] if HAS_LOOP_HOOKS else [_LoopHooks]),
    *([] if hasattr(TrainerCallback, "on_push_begin") else [_PushHook]),
):
    """What the installed Trainer lacks of the newest one's hooks."""

    # transformers 5.19, which sets it on the instance. Before, Trainer counts all labels.
    _loss_shifts_labels = False

    if HAS_LOOP_HOOKS:

        def _norm_without_clipping(self) -> None:
            """Has the norm taken before the optimizer's step, where the loop does so only to clip."""


def sort_checkpoints(run_dir: str, use_mtime: bool = False) -> list[str]:
    """The checkpoints of a run, the oldest first. transformers 5.3: `trainer_utils.sort_checkpoints`."""
    numbers = {str(path): re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(run_dir).glob("checkpoint-*")}
    folders = sorted((int(m[1]), folder) for folder, m in numbers.items() if m and Path(folder).is_dir())
    times = sorted((Path(folder).stat().st_mtime, number, folder) for number, folder in folders)
    # A disk may keep no times.
    if use_mtime and times and times[-1][0] - times[0][0] >= 1:
        return [folder for *_, folder in times]
    return [folder for _, folder in folders]


# ---- the Hub ----

try:
    from huggingface_hub.utils import httpx

    CONNECTION_ERRORS: tuple[type[Exception], ...] = (httpx.TransportError, ConnectionError)  # the latter: hf_xet's
except ImportError:  # huggingface_hub 1.0, so transformers 5.0
    import requests

    CONNECTION_ERRORS = (requests.ConnectionError, requests.Timeout, ConnectionError)
