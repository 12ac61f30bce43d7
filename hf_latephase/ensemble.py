"""Predictions of the members and of their ensemble, without copies of the base weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .late_phase import LatePhase


def ensemble_log_probs(late_phase: LatePhase, predict: Callable[[], Tensor]) -> Tensor:
    """
    Returns the log of the members' mean predicted probabilities.

    Args:
        late_phase (`LatePhase`):
            The members.
        predict (`Callable[[], torch.Tensor]`):
            Runs the model on fixed inputs and returns its logits `[..., classes]`; called once a member.

    Returns:
        `torch.Tensor`: `[..., classes]`, float32 or wider. Only one such tensor is kept, whatever K is.
    """
    total = None
    for member in range(late_phase.num_members):
        late_phase.activate(member)
        logits = predict()
        log_probs = torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)
        total = log_probs if total is None else torch.logaddexp(total, log_probs)
    assert total is not None
    return total - math.log(late_phase.num_members)


def negative_log_likelihood(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """
    Returns the mean negative log-likelihood in nats over all labels that are not -100 (0-d, float32 or wider).

    Args:
        logits (`torch.Tensor` of shape `[..., classes]`):
            Logits or log-probabilities.
        labels (`torch.Tensor` of shape `[...]`):
            Class indices.
        shift (`bool`):
            Whether position t predicts label t + 1, as in causal language models.
    """
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


class MemberTable(dict[str, dict[str, float]]):
    """
    The metrics of each member (`"member_0"`, …), of the averaged model (`"average"`) and of the ensemble
    (`"ensemble"`: mean of the predicted probabilities). Prints as one table.
    """

    def __str__(self) -> str:
        columns = list(dict.fromkeys(key for row in self.values() for key in row))
        width = max(map(len, self), default=0)
        lines = [" ".join([" " * width, *(f"{column:>12}" for column in columns)])]
        for name, row in self.items():
            lines.append(" ".join([f"{name:<{width}}", *(f"{row.get(c, math.nan):12.6g}" for c in columns)]))
        return "\n".join(lines)

    def summary(self, prefix: str) -> dict[str, Any]:
        """Returns the few figures worth logging."""
        losses = torch.tensor(list(self._losses("member_")))
        return {
            f"{prefix}_member_loss_mean": losses.mean().item(),
            f"{prefix}_member_loss_std": losses.std(correction=0).item(),
            f"{prefix}_average_loss": self["average"]["loss"],
            f"{prefix}_ensemble_loss": self["ensemble"]["loss"],
        }

    def _losses(self, start: str) -> Iterator[float]:
        return (row["loss"] for name, row in self.items() if name.startswith(start))
