"""Bits per character, the measure of character-level language models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from datasets import Features, Value
from evaluate import Metric, MetricInfo


_DESCRIPTION = """
Bits per character: the negative log-likelihood that a language model gives a text, in bits, over the number of
characters it was asked to predict. Characters are what the model's symbols stand for; for byte-level models, bytes.
"""

_INPUTS_DESCRIPTION = """
Args:
    nll (`list[float]`):
        Negative log-likelihoods in nats (natural logarithm), each summed over the characters of one example.
    characters (`list[int]`):
        How many characters each of these sums runs over.

Returns:
    `dict[str, float]`: `bits_per_character`, the sum of all `nll` over the sum of all `characters`, over ln 2.
"""


class BitsPerCharacter(Metric):
    """
    Bits per character from summed negative log-likelihoods.

    Instantiate the class: `evaluate.load` would look for code on the Hub. Examples count by their length, so the
    figure does not depend on how a text was cut up. Do not feed it `eval_loss` times a length: Trainer's loss is not
    always a mean over the predicted tokens.

    Args:
        kwargs (*optional*):
            As in [`~evaluate.Metric`], `keep_in_memory=True` for example.

    Raises:
        `ValueError`: By `compute`, if there are no characters, a count is negative, or a likelihood is not a number.

    Example:

    ```python
    >>> from math import log
    >>> from hf_latephase.metrics import BitsPerCharacter

    >>> metric = BitsPerCharacter()
    >>> metric.add_batch(nll=[3 * log(2)], characters=[1])
    >>> metric.add_batch(nll=[3 * log(2)], characters=[3])
    >>> round(metric.compute()["bits_per_character"], 6)
    1.5
    ```
    """

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS_DESCRIPTION,
            features=Features({"nll": Value("float64"), "characters": Value("int64")}),
        )

    def _compute(self, nll: Sequence[float], characters: Sequence[int]) -> dict[str, float]:
        counts = np.asarray(characters, dtype=np.int64)
        if (counts < 0).any():
            raise ValueError(f"characters must not be negative, got {counts.min()}.")
        num_characters = int(counts.sum())
        if num_characters == 0:
            raise ValueError("There are no characters to average over. Add at least one example that has some.")
        # fsum is exact: no order of the examples, and no number of them, changes the result.
        total = math.fsum(nll)
        if math.isnan(total):
            raise ValueError("A negative log-likelihood is not a number. Check the model for NaN weights or logits.")
        return {"bits_per_character": total / num_characters / math.log(2)}
