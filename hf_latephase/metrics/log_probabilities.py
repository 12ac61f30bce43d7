"""What metrics of predicted class probabilities have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


# Sums of probabilities computed in bfloat16 are within this of one, which logits practically never are.
_SUM_TOLERANCE = 1e-2


def checked_log_probs(log_probs: Sequence[Sequence[float]]) -> np.ndarray:
    """
    Returns log-probabilities as a float64 array `[examples, classes]`.

    Args:
        log_probs (`Sequence[Sequence[float]]`):
            Natural logarithms of the predicted probabilities, a row an example. `-inf` is a probability of zero.

    Raises:
        `ValueError`: If there are no examples, rows differ in length, or a row is no distribution.
    """
    if not len(log_probs):
        raise ValueError("There are no examples to average over. Add at least one.")
    if len(lengths := {len(row) for row in log_probs}) > 1:
        raise ValueError(
            f"log_probs have rows of different lengths, {sorted(lengths)}, but every example must have one number per "
            "class. Compute models with different classes apart."
        )
    rows = np.asarray(log_probs, dtype=np.float64)
    # Written so that NaN fails too; the sum of logits may overflow.
    with np.errstate(over="ignore"):
        wrong = ~(np.abs(np.exp(rows).sum(-1) - 1) <= _SUM_TOLERANCE)
    if wrong.any():
        example = int(wrong.argmax())
        raise ValueError(
            f"The probabilities of {wrong.sum()} of {len(rows)} examples do not sum to one; the first is example "
            f"{example} with log_probs {rows[example]}. Give log_softmax(logits), not logits or probabilities, and "
            "check the model for NaN weights."
        )
    return rows


def predictive_entropy(log_probs: np.ndarray) -> np.ndarray:
    """
    Returns the entropy of each predicted distribution in nats, `[examples]`, float64.

    Args:
        log_probs (`np.ndarray` of shape `[examples, classes]`):
            Natural logarithms of the predicted probabilities, float64.
    """
    # Sorted, so that distributions that differ in the order of the classes are equal to the last bit, and count as
    # ties. A class of probability zero adds nothing.
    ordered = np.sort(log_probs, -1)
    probs = np.exp(ordered)
    return -np.multiply(probs, ordered, out=np.zeros_like(probs), where=probs > 0).sum(-1)
