"""Evaluates members, averaged model and ensemble through a trainer's own evaluation loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..core.ensemble import MemberTable, ensemble_log_probs, negative_log_likelihood
from ..core.late_phase import LatePhase


class MemberEvaluation:
    """
    Evaluates each member, the averaged model and the ensemble through one and the same evaluation loop.

    Args:
        late_phase (`LatePhase`):
            The members, on whose model the loop calls [`~MemberEvaluation.select_member`] and
            [`~MemberEvaluation.predict`].
    """

    def __init__(self, late_phase: LatePhase) -> None:
        self._late_phase = late_phase
        # What the loop looks at: a member, "average" or "ensemble"; `None` outside of `run`.
        self._viewpoint: int | str | None = None

    @property
    def is_running(self) -> bool:
        """Whether the evaluation loop runs for this."""
        return self._viewpoint is not None

    def run(self, evaluate: Callable[[str], dict[str, float]]) -> MemberTable:
        """
        Evaluates all; see [`~LatePhaseMixin.evaluate_members`].

        Args:
            evaluate (`Callable[[str], dict[str, float]]`):
                Runs the loop once and returns its metrics, without prefix. Gets the name of what it looks at.
        """
        # Before T0 there is one member; the others wait for its values.
        members = self._late_phase.num_members if self._late_phase.released else 1
        table = MemberTable({f"member_{member}": {} for member in range(members)} | {"average": {}})

        def look_at(name: str, viewpoint: int | str) -> None:
            self._viewpoint = viewpoint
            table[name] = {key: value for key, value in evaluate(name).items() if "model_preparation" not in key}

        try:
            look_at("average", "average")  # of the model as it is, which after training is the stock model
            with self._late_phase.attached():
                for member in range(members):
                    look_at(f"member_{member}", member)
                look_at("ensemble", "ensemble")
        finally:
            self._viewpoint = None
        return table

    def select_member(self) -> None:
        """Has the model compute with the member that is looked at, if it is one."""
        if isinstance(self._viewpoint, int):
            self._late_phase.activate(self._viewpoint)

    def predict(self, prediction_step: Callable[[], tuple[Any, Any, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        """
        Predicts one batch.

        Args:
            prediction_step (`Callable`):
                Runs Trainer's `prediction_step` on the batch; called once a member for the ensemble.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: The negative log-likelihood of the labels, the logits
            (of the ensemble: its log-probabilities) and the labels.
        """
        labels: Any = None

        def logits_of_member() -> Tensor:
            nonlocal labels
            _, logits, labels = prediction_step()
            if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
                raise ValueError(
                    "evaluate_members() compares predicted probabilities and needs one logits tensor and integer "
                    "labels; this model or dataset gives others. Use evaluate()."
                )
            return logits

        if self._viewpoint == "ensemble":
            logits = ensemble_log_probs(self._late_phase, logits_of_member)
        else:
            logits = logits_of_member()
        shift = _predicts_next_token(extract_model_from_parallel(self._late_phase.model))
        return negative_log_likelihood(logits, labels, shift=shift), logits, labels


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether position i predicts label i + 1, told by the class too: Trainer overlooks gpt2 and others."""
    get_base_model: Any = getattr(model, "get_base_model", None)  # an adapter's
    model = model if get_base_model is None else get_base_model()
    is_decoder_only = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss and is_decoder_only
    return shifts or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
