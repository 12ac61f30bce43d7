"""Calibration and out-of-distribution metrics, beside twins that go one example, or one pair, at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate import Metric
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hf_latephase.metrics import OODAUROC, Calibration


NAMES = ("accuracy", "nll", "brier_score", "calibration_error")


def calibration(log_probs: Any, labels: Any, **kwargs: Any) -> dict[str, float]:
    return Calibration(keep_in_memory=True).compute(log_probs=log_probs, labels=labels, **kwargs)


def auroc(log_probs: Any, marks: Any) -> float:
    return OODAUROC(keep_in_memory=True).compute(log_probs=log_probs, out_of_distribution=marks)["ood_auroc"]


def random_log_probs(rows: int, classes: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=scale, size=(rows, classes))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# ---- the twins ----


def calibration_twin(log_probs: Any, labels: Any, num_bins: int = 15) -> dict[str, float]:
    count = len(labels)
    hits, nll, brier = 0, 0.0, 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for row, label in zip(log_probs, labels, strict=True):
        probs = [math.exp(value) for value in row]
        top = max(range(len(probs)), key=lambda c: (probs[c], -c))
        hits += top == label
        nll -= row[label]
        for c, p in enumerate(probs):
            brier += (p - 1) ** 2 if c == label else p**2
        inside = [b for b in range(num_bins) if b / num_bins < probs[top] <= (b + 1) / num_bins]
        bins[inside[0]].append((probs[top], top == label))
    error = 0.0
    for content in filter(None, bins):
        accuracy = sum(hit for _, hit in content) / len(content)
        confidence = sum(p for p, _ in content) / len(content)
        error += len(content) / count * abs(accuracy - confidence)
    return dict(zip(NAMES, (hits / count, nll / count, brier / count, error), strict=True))


def auroc_twin(scores: Any, marks: Any) -> float:
    outside = [s for s, mark in zip(scores, marks, strict=True) if mark]
    inside = [s for s, mark in zip(scores, marks, strict=True) if not mark]
    wins = sum(1.0 if o > i else 0.5 if o == i else 0.0 for o in outside for i in inside)
    return wins / (len(outside) * len(inside))


def entropies(log_probs: Any) -> list[float]:
    return [-math.fsum(math.exp(v) * v for v in row if v > -math.inf) for row in log_probs]


# ---- calibration ----


@pytest.mark.parametrize("num_bins", [1, 2, 10, 15, 100])
@pytest.mark.parametrize("classes", [2, 10])
def test_calibration_is_what_the_twin_says(classes: int, num_bins: int) -> None:
    log_probs = random_log_probs(300, classes, seed=num_bins)
    # Right more often than not, so that no figure is at an end of its range.
    labels = np.where(np.arange(300) % 3 > 0, log_probs.argmax(-1), np.arange(300) % classes)
    result = calibration(log_probs, labels, num_bins=num_bins)
    assert list(result) == list(NAMES)
    assert result == pytest.approx(calibration_twin(log_probs, labels, num_bins), rel=1e-13, abs=1e-15)
    assert all(isinstance(value, float) for value in result.values())


def test_fifteen_bins_unless_told() -> None:
    log_probs, labels = random_log_probs(200, 3), np.arange(200) % 3
    default = calibration(log_probs, labels)
    assert default == calibration(log_probs, labels, num_bins=15)
    assert default["calibration_error"] != calibration(log_probs, labels, num_bins=14)["calibration_error"]


def test_figures_worked_out_by_hand() -> None:
    log_probs = np.log([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.1, 0.9]])
    result = calibration(log_probs, [0, 1, 1, 1], num_bins=10)
    # 0.8 twice, right once; 0.6 right; 0.9 right.
    assert result["accuracy"] == 0.75
    assert result["nll"] == pytest.approx(-math.log(0.8 * 0.2 * 0.6 * 0.9) / 4)
    assert result["brier_score"] == pytest.approx((2 * 0.2**2 + 2 * 0.8**2 + 2 * 0.4**2 + 2 * 0.1**2) / 4)
    assert result["calibration_error"] == pytest.approx((2 * 0.3 + 0.4 + 0.1) / 4)


def test_bins_are_open_on_the_left() -> None:
    # 0.5 (exact) belongs to the lower of two bins. Gaps 0.5 there and -0.25 above; in one bin they would cancel out.
    log_probs = np.log([[0.5, 0.5], [0.75, 0.25]])
    assert calibration(log_probs, [1, 0], num_bins=2)["calibration_error"] == pytest.approx(0.375)
    assert calibration(log_probs, [1, 0], num_bins=1)["calibration_error"] == pytest.approx(0.125)


def test_certain_predictions() -> None:
    # Probabilities 1 and 0, and one that float32 rounds to above 1.
    log_probs = [[0.0, -math.inf], [-math.inf, 0.0], [1e-7, -30.0]]
    right = calibration(log_probs, [0, 1, 0])
    assert right == pytest.approx(dict(zip(NAMES, (1, 0, 0, 0), strict=True)), abs=1e-6)
    # What is above 1 belongs to the last bin, where gaps of 1 and -0.05 meet.
    assert calibration([[1e-7, -30.0], np.log([0.95, 0.05])], [1, 0])["calibration_error"] == pytest.approx(0.475)
    wrong = calibration(log_probs[:2], [1, 0])
    assert wrong == dict(zip(NAMES, (0, math.inf, 2, 1), strict=True))


@pytest.mark.parametrize("classes", [2, 5])
def test_perfectly_calibrated_predictions_have_a_small_error(classes: int) -> None:
    log_probs = random_log_probs(20_000, classes)
    uniform = np.random.default_rng(1).random((20_000, 1))
    labels = (np.exp(log_probs).cumsum(-1) < uniform).sum(-1).clip(0, classes - 1)
    assert calibration(log_probs, labels)["calibration_error"] < 0.02
    # Twice too sure: the error shows.
    sharp = 2 * log_probs
    sharp -= np.log(np.exp(sharp).sum(-1, keepdims=True))
    assert calibration(sharp, labels)["calibration_error"] > 0.05


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 6), st.integers(1, 20))
def test_calibration_does_not_depend_on_order(seed: int, rows: int, classes: int, num_bins: int) -> None:
    generator = np.random.default_rng(seed)
    log_probs, labels = random_log_probs(rows, classes, seed), generator.integers(classes, size=rows)
    result = calibration(log_probs, labels, num_bins=num_bins)
    order, names = generator.permutation(rows), generator.permutation(classes)
    shuffled = calibration(log_probs[order], labels[order], num_bins=num_bins)
    assert {k: shuffled[k] for k in NAMES[:3]} == {k: result[k] for k in NAMES[:3]}
    assert shuffled == pytest.approx(result, rel=1e-13, abs=1e-15)
    renamed = calibration(log_probs[:, names], names.argsort()[labels], num_bins=num_bins)
    assert renamed == pytest.approx(result, rel=1e-13, abs=1e-15)
    assert 0 <= result["calibration_error"] <= 1
    assert 0 <= result["brier_score"] <= 2


# ---- out-of-distribution ----


def test_auroc_is_what_the_twin_says() -> None:
    log_probs = random_log_probs(200, 4, scale=3)
    marks = np.random.default_rng(2).random(200) < 0.3
    # Pairs of equal entropy across the two kinds.
    log_probs[:20] = log_probs[100:120]
    scores = entropies(log_probs)
    # Equal rows have equal entropies in both ways of adding up; others differ by far more than rounding.
    assert auroc(log_probs, marks.astype(int)) == auroc_twin(scores, marks)
    assert auroc(log_probs, marks) == pytest.approx(roc_auc_score(marks, scores), rel=1e-12)


def test_entropy_and_nothing_else_counts() -> None:
    # The most probable class is equally probable in both; the rest tells them apart.
    inside, outside = np.log([0.5, 0.48, 0.02]), np.log([0.5, 0.25, 0.25])
    assert auroc([inside, outside], [0, 1]) == 1.0
    assert auroc([inside, outside], [1, 0]) == 0.0


def test_ties_count_half_whatever_the_classes_are_called() -> None:
    row, generator = random_log_probs(1, 20)[0], np.random.default_rng(0)
    assert auroc([generator.permutation(row) for _ in range(50)], [0] * 20 + [1] * 30) == 0.5
    row = np.log([0.1, 0.2, 0.3, 0.4])
    assert auroc([row, row, np.full(4, math.log(0.25))], [0, 1, 1]) == 0.75


def test_zero_probabilities_have_an_entropy() -> None:
    certain, unsure = [0.0, -math.inf], [math.log(0.5)] * 2
    assert auroc([certain, certain, unsure], [0, 0, 1]) == 1.0
    assert auroc([certain, unsure, certain], [0, 1, 1]) == 0.75


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30), st.randoms())
def test_auroc_counts_pairs_exactly(examples: list[tuple[int, bool]], random: Any) -> None:
    # Levels of entropy with many ties.
    levels = random_log_probs(6, 3)
    marks = [mark for _, mark in examples]
    if len(set(marks)) < 2:
        return
    rows = levels[[level for level, _ in examples]]
    scores = [entropies(levels)[level] for level, _ in examples]
    result = auroc(rows, marks)
    assert result == auroc_twin(scores, marks)
    assert result + auroc(rows, [not mark for mark in marks]) == pytest.approx(1, abs=1e-15)
    order = list(range(len(marks)))
    random.shuffle(order)
    assert auroc(rows[order], [marks[i] for i in order]) == result


# ---- both ----


@pytest.mark.parametrize("metric_class", [Calibration, OODAUROC])
def test_batches_add_up_to_one_call(metric_class: Callable[..., Metric], tmp_path: Path) -> None:
    metric = metric_class(cache_dir=str(tmp_path))
    name = next(n for n in metric.features if n != "log_probs")
    log_probs, marks = random_log_probs(30, 2), np.arange(30) % 2
    expected = metric.compute(log_probs=log_probs, **{name: marks})
    for start in range(0, 30, 7):
        part = slice(start, start + 7)
        # Tensors as a model gives them, too.
        metric.add_batch(log_probs=torch.from_numpy(log_probs[part]), **{name: torch.from_numpy(marks[part])})
    assert metric.compute() == expected


@pytest.mark.parametrize("compute", [calibration, auroc])
def test_what_is_no_distribution_is_an_error(compute: Callable[..., Any]) -> None:
    good = math.log(0.5)
    for bad in ([3.0, 1.0], [0.5, 0.5], [math.nan, good], [1000.0, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="1 of 2 examples do not sum to one; the first is example 1.*log_softmax"):
            compute([[good, good], bad], [0, 1])
    with pytest.raises(ValueError, match=r"different lengths, \[1, 2\]"):
        compute([[good, good], [0.0]], [0, 1])
    with pytest.raises(ValueError, match="no examples"):
        compute([], [])


def test_low_precision_is_a_distribution() -> None:
    log_probs = torch.randn(64, 1000).log_softmax(-1).bfloat16().float()
    assert 0 <= calibration(log_probs, [0] * 64)["calibration_error"] <= 1


def test_labels_that_are_no_class_are_errors() -> None:
    log_probs = random_log_probs(2, 3)
    for labels in ([0, 3], [-100, 0]):
        with pytest.raises(ValueError, match="3 classes were predicted"):
            calibration(log_probs, labels)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        calibration(log_probs, [0, 1], num_bins=0)


def test_both_kinds_are_needed() -> None:
    log_probs = random_log_probs(2, 3)
    with pytest.raises(ValueError, match="2 examples from inside and 0 from outside"):
        auroc(log_probs, [0, 0])
    with pytest.raises(ValueError, match="0 examples from inside and 2 from outside"):
        auroc(log_probs, [1, 1])
    with pytest.raises(ValueError, match="1 .outside. or 0"):
        auroc(log_probs, [0, 2])


def test_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("network used")

    for name in ("socket.socket.connect", "socket.getaddrinfo"):
        monkeypatch.setattr(name, refuse)
    rows = [[0.0, -math.inf], [-math.inf, 0.0]]
    assert Calibration(cache_dir=str(tmp_path)).compute(log_probs=rows, labels=[0, 0])["accuracy"] == 0.5
    assert OODAUROC(cache_dir=str(tmp_path)).compute(log_probs=rows, out_of_distribution=[0, 1])["ood_auroc"] == 0.5
