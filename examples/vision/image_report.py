"""What a comparison of image classifiers leaves behind: figures of each method, their table, JSON and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from common.report import Result, format_table, plot_curves
from hf_latephase.analysis import EnsemblePrediction
from hf_latephase.metrics import OODAUROC, Calibration


# Of the test split, in the order of the table.
MEASURES = {"accuracy": "accuracy", "nll": "NLL", "brier_score": "Brier", "calibration_error": "ECE"}
ENSEMBLE_MEASURES = {"disagreement": "disagreement", "mutual_information": "mutual information"}
NOTE = (
    "NLL and mutual information in nats, Brier score summed over the classes, ECE: expected calibration error in 15 "
    "bins. OOD: AUROC of the predictive entropy, the test images against those of that name. Rows of an ensemble "
    "average the predicted probabilities of its members; disagreement is the share of pairs of members whose classes "
    "differ. The minutes are those of training, with the evaluations for the curves."
)


@dataclass
class ImageResult:
    """
    The figures of one row of the table.

    Attributes:
        method (`str`): The method.
        variant (`str`): What of it, `"SWA"` or `"ensemble"` for example; empty for the averaged model.
        minutes (`float`): Minutes of training.
        scores (`dict[str, dict[str, float]]`): By split: accuracy, nll and the like.
        ood_auroc (`dict[str, float]`): By out-of-distribution data.
        curve (`list[dict[str, float]]`): Points on the way: `step`, `error`, `error_averaged`.
        details (`dict[str, Any]`): Anything else worth keeping.
    """

    method: str
    variant: str
    minutes: float
    scores: dict[str, dict[str, float]]
    ood_auroc: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.method}, {self.variant}" if self.variant else self.method


def score(
    predictions: Mapping[str, EnsemblePrediction], labels: Mapping[str, Tensor], is_ensemble: bool
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """
    Scores predictions.

    Args:
        predictions (`Mapping[str, EnsemblePrediction]`):
            By image set, `"test"` among them.
        labels (`Mapping[str, torch.Tensor]`):
            Labels of the sets that have some; the others are out-of-distribution data.
        is_ensemble (`bool`):
            Whether there is disagreement to report.

    Returns:
        `tuple[dict[str, dict[str, float]], dict[str, float]]`: Measures by labelled set, and AUROC by set from
        outside.
    """
    scores: dict[str, dict[str, float]] = {}
    for name, targets in labels.items():
        metric = Calibration(keep_in_memory=True)
        metric.add_batch(log_probs=predictions[name].log_probs.double().numpy(), labels=targets.numpy())
        scores[name] = metric.compute()
        if is_ensemble:
            scores[name] |= {
                measure: getattr(predictions[name], measure).double().mean().item() for measure in ENSEMBLE_MEASURES
            }
    outside = {name: _auroc(predictions["test"], predictions[name]) for name in predictions if name not in labels}
    return scores, outside


def table(results: Sequence[ImageResult]) -> str:
    """One row a result in markdown: the test split's figures, and the accuracy on the validation split if any."""
    outside = list(results[0].ood_auroc)
    measures = list(MEASURES)
    if any("disagreement" in result.scores["test"] for result in results):
        measures += ENSEMBLE_MEASURES
    has_validation = "validation" in results[0].scores
    names = MEASURES | ENSEMBLE_MEASURES
    rows = [
        [
            "method",
            *(["validation accuracy"] if has_validation else []),
            *(names[measure] for measure in measures),
            *(f"OOD {name}" for name in outside),
            "minutes",
        ]
    ]
    for result in results:
        validation = [result.scores["validation"]["accuracy"]] if has_validation else []
        figures = [*validation, *(result.scores["test"].get(measure) for measure in measures)]
        figures += [result.ood_auroc[name] for name in outside]
        cells = ["–" if figure is None else f"{figure:.4f}" for figure in figures]
        rows.append([result.name, *cells, f"{result.minutes:.2f}"])
    return format_table(rows)


def write_results(
    results: Sequence[ImageResult], settings: dict[str, Any], average: str, start: int, watched: str, folder: Path
) -> str:
    """
    Write `results.json`, `results.md` and `curves.png`.

    Args:
        results (`Sequence[ImageResult]`):
            The rows.
        settings (`dict[str, Any]`):
            What the figures belong to.
        average (`str`):
            What the average over time is called.
        start (`int`):
            T0, in steps.
        watched (`str`):
            What the curves show the error rate of.
        folder (`Path`):
            Where the files go; made if it is missing.

    Returns:
        `str`: The table with its note.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{table(results)}\n\n{NOTE}\n"
    content = {"settings": settings, "results": [asdict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    curves = {result.method: result for result in reversed(results) if result.curve}
    lines = []
    for method, result in reversed(curves.items()):
        has_average = any("error_averaged" in point for point in result.curve)
        lines.append(Result(method, result.minutes, {}, {} if has_average else None, result.curve))
    plot_curves(lines, average, start, f"error rate, {watched}", folder / "curves.png", measure="error")
    return text


def _auroc(inside: EnsemblePrediction, outside: EnsemblePrediction) -> float:
    metric = OODAUROC(keep_in_memory=True)
    for prediction, mark in ((inside, 0), (outside, 1)):
        log_probs = prediction.log_probs.double().numpy()
        metric.add_batch(log_probs=log_probs, out_of_distribution=[mark] * len(log_probs))
    return metric.compute()["ood_auroc"]
