"""All that depends on a release: transformers 4.56.2, torch 2.6 or newer. Each piece names the floor that ends it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import transformers
from huggingface_hub.errors import HfHubHTTPError
from packaging.version import Version
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging


logger = logging.get_logger(__name__)
RELEASE = Version(transformers.__version__)
_Trainer: Any = object  # what comes behind in a trainer's bases
FSDP2_TORCH = "2.13"  # before, updates with FSDP2 differ from those of one process by 3e-8 (seen with 2.7.1 and 2.9.1)
DEEPSPEED = "0.19.8"  # older ones were never tried
TESTED_TRANSFORMERS = "5.24"  # the newest that all tests have passed with


def warn_of_untested() -> None:
    """Says once that the installed transformers is newer than any that the tests have passed with."""
    if RELEASE.release[:2] > Version(TESTED_TRANSFORMERS).release:
        logger.warning_once(
            f"transformers {RELEASE} is newer than {TESTED_TRANSFORMERS}, with which all tests of hf_latephase passed."
            " If something fails, install that one."
        )


PreTrainedConfig: Any = getattr(transformers, "PreTrainedConfig", transformers.PretrainedConfig)  # transformers 5.0
WARMUP_SHARE = "warmup_steps" if RELEASE.major >= 5 else "warmup_ratio"  # takes a share of the steps. transformers 5.0
# What models call their memory of the text. transformers 5.24: `cache`.
STATE_NAME = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"


def state_name(model: nn.Module) -> str:
    """What a model calls its memory: as its release of transformers does, unless its code is older."""
    parameters = inspect.signature(model.forward).parameters
    return "past_key_values" if "past_key_values" in parameters and "cache" not in parameters else STATE_NAME


LOOP_HAS_HOOKS = hasattr(Trainer, "_run_epoch")


class _LoopHooks(_Trainer):
    """Calls the hooks of Trainer's newer loop from the older one, which is a single method. transformers 5.3."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if step := vars(cls).get("training_step"):

            def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
                loss = step(self, *args, **kwargs)
                self._sync_gradients = self.accelerator.sync_gradients
                if self._is_first_update:  # what a resumed run brings along comes first in the loop's sum
                    loss, self._tr_loss = loss + self._tr_loss, 0.0
                return loss

            cls.training_step = functools.wraps(step)(training_step)

    _run_trial: Any = None
    _sync_gradients = _is_first_update = True
    _tr_loss: Any = 0.0  # the loop's sum, a local variable there

    def _inner_training_loop(self, batch_size: Any = None, args: Any = None, **kwargs: Any) -> Any:
        self.accelerator.clip_grad_norm_ = lambda *_: self._with_own_norm(self._clip_grad_norm)
        self._tr_loss, self._is_first_update = 0.0, True
        try:
            return super()._inner_training_loop(batch_size, args, **kwargs)
        finally:
            del self.accelerator.clip_grad_norm_

    def _with_own_norm(self, hook: Any) -> Any:
        self.accelerator.gradient_state._set_sync_gradients(self._sync_gradients)  # the loop has set it since
        redirected = self.accelerator.__dict__.pop("clip_grad_norm_")
        try:
            return hook(self.model_wrapped)
        finally:
            self.accelerator.clip_grad_norm_ = redirected

    def _norm_without_clipping(self) -> None:
        if not self.args.max_grad_norm:
            self._with_own_norm(self._get_grad_norm)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_first_update or self.state.global_step < self.state.max_steps:
            return super().get_batch_samples(*args, **kwargs)
        self.control.should_training_stop = True
        return [], None

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._tr_loss, self._run_trial, self._is_first_update = tr_loss, args[2], False
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _sorted_checkpoints(self, *args: Any, **kwargs: Any) -> list[str]:
        if not self.is_in_train:  # asked for by the end of the loop, which deletes all but the best
            self._finalize_training(self._run_trial)
        return super()._sorted_checkpoints(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any) -> None:
        pass


class _PushHook(_Trainer):
    """Says that an upload in the background begins, of which no callback is told. transformers 5.0."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        is_free = self.push_in_progress is None or self.push_in_progress.is_done() or self.args.hub_always_push
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and is_free:
            self._publishing.begin()
        super()._push_from_checkpoint(checkpoint_folder)


class _LossHook(_Trainer):
    """Divides by the accumulation steps what `compute_loss_func` returns, if told to. transformers 5.19."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        self._loss_shifts_labels = False  # Trainer counts all labels

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        # One that cannot be called is TRL's, before its release 1, which divides by itself.
        is_undivided = self.loss_is_scaled_for_ga is False and callable(self.compute_loss_func)
        return loss / self.current_gradient_accumulation_steps if is_undivided else loss


_LACKING = [_LoopHooks] if not LOOP_HAS_HOOKS else []
_LACKING += [_LossHook] if not hasattr(Trainer, "loss_is_scaled_for_ga") else []
_LACKING += [_PushHook] if not hasattr(TrainerCallback, "on_push_begin") else []
TrainerHooks: Any = type("TrainerHooks", tuple(_LACKING), {})


try:
    from huggingface_hub.utils import httpx

    REFUSAL: Any = HfHubHTTPError
    CONNECTION_ERRORS: tuple[type[Exception], ...] = (httpx.TransportError, ConnectionError)  # the latter: hf_xet's
except ImportError:  # huggingface_hub 1.0, so transformers 5.0
    import requests

    REFUSAL, CONNECTION_ERRORS = requests.HTTPError, (requests.ConnectionError, requests.Timeout, ConnectionError)
