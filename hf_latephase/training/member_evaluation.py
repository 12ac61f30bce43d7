"""Evaluates members, averaged model and ensemble through a trainer's own evaluation loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..core.ensemble import MemberTable, ensemble_log_probs, negative_log_likelihood


logger = logging.get_logger(__name__)


class MemberEvaluation:
    """
    Runs a trainer's evaluation loop once for each member, for the averaged model and for the ensemble.

    Args:
        trainer (`LatePhaseMixin`):
            The trainer, whose loop calls [`~MemberEvaluation.select_member`] and [`~MemberEvaluation.predict`].
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        # What the loop looks at: a member, "average" or "ensemble"; `None` outside of `run`.
        self._viewpoint: int | str | None = None

    @property
    def is_running(self) -> bool:
        """Whether the trainer's evaluation loop runs for this."""
        return self._viewpoint is not None

    def run(self, eval_dataset: Any, ignore_keys: list[str] | None, metric_key_prefix: str) -> MemberTable:
        """Evaluates all and logs the table; see [`~LatePhaseMixin.evaluate_members`]."""
        trainer = self._trainer
        dataloader = trainer.get_eval_dataloader(eval_dataset)
        # Before T0 there is one member; the others wait for its values.
        members = trainer.late_phase.num_members if trainer.late_phase.released else 1
        table = MemberTable({f"member_{member}": {} for member in range(members)} | {"average": {}})

        def evaluate(name: str, viewpoint: int | str) -> None:
            self._viewpoint = viewpoint
            metrics = trainer.evaluation_loop(
                dataloader,
                description=f"Evaluation of {name}",
                prediction_loss_only=trainer.compute_metrics is None,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            ).metrics
            prefix = f"{metric_key_prefix}_"
            table[name] = {k.removeprefix(prefix): v for k, v in metrics.items() if "model_preparation" not in k}

        try:
            evaluate("average", "average")  # of the model as it is, which after training is the stock model
            with trainer.late_phase.attached():
                for member in range(members):
                    evaluate(f"member_{member}", member)
                evaluate("ensemble", "ensemble")
        finally:
            self._viewpoint = None
        trainer.log(table.summary(metric_key_prefix))
        if trainer.is_world_process_zero():
            logger.info(f"Members, average and ensemble:\n{table}")
        return table

    def select_member(self) -> None:
        """Has the model compute with the member that is looked at, if it is one."""
        if isinstance(self._viewpoint, int):
            self._trainer.late_phase.activate(self._viewpoint)

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
            logits = ensemble_log_probs(self._trainer.late_phase, logits_of_member)
        else:
            logits = logits_of_member()
        return negative_log_likelihood(logits, labels, shift=self._predicts_next_token()), logits, labels

    def _predicts_next_token(self) -> bool:
        """Whether position i predicts label i + 1, told by the class too: Trainer overlooks gpt2 and others."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.late_phase.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        is_decoder_only = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss and is_decoder_only
        return shifts or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
