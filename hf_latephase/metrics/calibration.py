"""How good predicted class probabilities are, as decisions and as probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from datasets import Features, List, Value
from evaluate import Metric, MetricInfo

from .log_probabilities import checked_log_probs


_DESCRIPTION = """
Accuracy, negative log-likelihood, Brier score and expected calibration error of predicted class probabilities.
"""

_CITATION = """
@inproceedings{guo2017calibration,
  title     = {On Calibration of Modern Neural Networks},
  author    = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year      = {2017}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    log_probs (`list[list[float]]`):
        Natural logarithms of the predicted probabilities, one row per example, one number per class.
    labels (`list[int]`):
        True classes, counted from 0.
    num_bins (`int`, defaults to 15):
        Bins of the calibration error.

Returns:
    `dict[str, float]`: `accuracy`, `nll` (nats per example), `brier_score` (0 to 2) and `calibration_error` (0 to 1).
"""


class Calibration(Metric):
    """
    Accuracy, negative log-likelihood, Brier score and expected calibration error from log-probabilities.

    - `accuracy`: share of the examples whose most probable class (the first of equals) is the label.
    - `nll`: mean of −log p(label), in nats. Infinite if a label had probability zero.
    - `brier_score`: mean over the examples of Σ_c (p(c) − [c = label])², summed over the classes: 0 to 2.
    - `calibration_error`: of the most probable class ("top label"). Examples are put into `num_bins` bins of
      equal width by its probability, (0, 1/15], (1/15, 2/15], …; the error is the mean, weighted by the examples in
      each bin, of |accuracy − mean probability| (Guo et al., 2017).

    Instantiate the class: `evaluate.load` would look for code on the Hub. Computes in float64.

    Args:
        kwargs (*optional*):
            As in [`~evaluate.Metric`], `keep_in_memory=True` for example.

    Raises:
        `ValueError`: By `compute`, if there are no examples, rows are no log-probabilities, a label is no class, or
            `num_bins` is below 1.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_latephase.metrics import Calibration

    >>> metric = Calibration()
    >>> metric.add_batch(log_probs=np.log([[0.75, 0.25], [0.25, 0.75]]), labels=[0, 0])
    >>> {name: round(value, 6) for name, value in metric.compute().items()}
    {'accuracy': 0.5, 'nll': 0.836988, 'brier_score': 0.625, 'calibration_error': 0.25}

    ```
    """

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=Features({"log_probs": List(Value("float64")), "labels": Value("int64")}),
        )

    def _compute(
        self, log_probs: Sequence[Sequence[float]], labels: Sequence[int], num_bins: int = 15
    ) -> dict[str, float]:
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
        rows = checked_log_probs(log_probs)
        classes = np.asarray(labels, dtype=np.int64)
        if classes.min() < 0 or classes.max() >= rows.shape[1]:
            raise ValueError(
                f"labels go from {classes.min()} to {classes.max()}, but {rows.shape[1]} classes were predicted, "
                "counted from 0. Check that model and dataset have the same classes, and leave out ignored examples."
            )
        examples = np.arange(len(rows))
        probs = np.exp(rows)
        correct = rows.argmax(-1) == classes
        squared = (probs - (classes[:, None] == np.arange(rows.shape[1]))) ** 2
        # fsum is exact: no order of the examples changes the result.
        return {
            "accuracy": float(correct.mean()),
            "nll": math.fsum(-rows[examples, classes]) / len(rows),
            "brier_score": math.fsum(squared.ravel()) / len(rows),
            "calibration_error": _calibration_error(probs.max(-1), correct, num_bins),
        }


def _calibration_error(confidence: np.ndarray, correct: np.ndarray, num_bins: int) -> float:
    """The expected calibration error of `[examples]` probabilities and hits, bins open on the left."""
    edges = np.linspace(0, 1, num_bins + 1)
    # Rounding may put a probability a little above 1.
    bins = np.searchsorted(edges, np.minimum(confidence, 1)) - 1
    gaps = np.bincount(bins, confidence - correct)
    return float(np.abs(gaps).sum() / len(confidence))
