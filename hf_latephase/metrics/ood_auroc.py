"""How well the entropy of predictions tells data of another distribution from data like that of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Features, List, Value
from evaluate import Metric, MetricInfo

from .log_probabilities import checked_log_probs, predictive_entropy


_DESCRIPTION = """
Area under the ROC curve of the predictive entropy as a detector of out-of-distribution data: the probability that an
example from outside has a larger entropy than one from inside, ties counted half.
"""

_INPUTS_DESCRIPTION = """
Args:
    log_probs (`list[list[float]]`):
        Natural logarithms of the predicted probabilities, one row per example, one number per class.
    out_of_distribution (`list[int]`):
        1 for an example from outside (positive), 0 for one from inside (negative).

Returns:
    `dict[str, float]`: `ood_auroc`, from 0 to 1; 0.5 is what chance gives.
"""


class OODAUROC(Metric):
    """
    AUROC of the predictive entropy for out-of-distribution data.

    Data from outside are the positives. The figure is the probability that a random example from outside has a larger
    entropy than a random one from inside; ties count half. Add a test set and a dataset from outside, in any number
    of batches. Computed from ranks, exact in float64.

    Instantiate the class: `evaluate.load` would look for code on the Hub.

    Args:
        kwargs (*optional*):
            As in [`~evaluate.Metric`], `keep_in_memory=True` for example.

    Raises:
        `ValueError`: By `compute`, if rows are no log-probabilities, a mark is neither 0 nor 1, or one of the two
            kinds is missing.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_latephase.metrics import OODAUROC

    >>> metric = OODAUROC()
    >>> metric.add_batch(log_probs=np.log([[0.9, 0.1], [0.4, 0.6]]), out_of_distribution=[0, 0])
    >>> metric.add_batch(log_probs=np.log([[0.7, 0.3], [0.5, 0.5]]), out_of_distribution=[1, 1])
    >>> metric.compute()
    {'ood_auroc': 0.75}

    ```
    """

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS_DESCRIPTION,
            features=Features({"log_probs": List(Value("float64")), "out_of_distribution": Value("int64")}),
        )

    def _compute(self, log_probs: Sequence[Sequence[float]], out_of_distribution: Sequence[int]) -> dict[str, float]:
        entropy = predictive_entropy(checked_log_probs(log_probs))
        marks = np.asarray(out_of_distribution, dtype=np.int64)
        if not np.isin(marks, (0, 1)).all():
            raise ValueError("out_of_distribution must be 1 (outside) or 0 (inside) for every example.")
        outside = marks == 1
        positives, negatives = int(outside.sum()), int((~outside).sum())
        if not positives or not negatives:
            raise ValueError(
                f"There are {negatives} examples from inside and {positives} from outside, but the AUROC compares "
                "the two. Add the predictions on both datasets before compute()."
            )
        # Mann and Whitney's U; equal entropies share the middle of their ranks. Halves add up exactly.
        _, group, counts = np.unique(entropy, return_inverse=True, return_counts=True)
        ranks = (counts.cumsum() - (counts - 1) / 2)[group]
        u = ranks[outside].sum() - positives * (positives + 1) / 2
        return {"ood_auroc": float(u / (positives * negatives))}
