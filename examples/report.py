"""What a comparison of methods leaves behind: a table, its figures as JSON, and a plot of the curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")  # before pyplot: the machine may have no display

from matplotlib import pyplot as plt  # noqa: E402


@dataclass
class Result:
    """
    What one method achieved.

    Args:
        method (`str`):
            Its name.
        minutes (`float`):
            Minutes of training, evaluations on the way included.
        scores (`dict[str, float]`):
            By split, in bits per character: the final weights.
        averaged_scores (`dict[str, float]`, *optional*):
            The same of the weights averaged over time in the same run. `None`: no such average was collected.
        ensemble_scores (`dict[str, float]`, *optional*):
            The same of the mean of the members' predictions, from the final weights. `None`: not scored.
        curve (`list[dict[str, float]]`):
            Points on the way: `step`, `bpc` (or another measure), and `bpc_averaged` once there is an average.
        details (`dict[str, Any]`):
            Anything else worth keeping.
    """

    method: str
    minutes: float
    scores: dict[str, float]
    averaged_scores: dict[str, float] | None = None
    ensemble_scores: dict[str, float] | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def markdown_table(results: Sequence[Result], average: str) -> str:
    """
    One row a method: each split without and with averaging over time, and the minutes. Another of its ensemble.

    Args:
        results (`Sequence[Result]`):
            The rows, of the same splits.
        average (`str`):
            What the average over time is called, `"SWA"` for example.

    Returns:
        `str`: A table in markdown.
    """
    splits = list(results[0].scores)
    header = ["method", *(name for split in splits for name in (split, f"{split}, {average}")), "minutes"]
    rows = [header]
    for result in results:
        averaged = result.averaged_scores or {}
        cells = [_figure(scores.get(split)) for split in splits for scores in (result.scores, averaged)]
        rows.append([result.method, *cells, f"{result.minutes:.2f}"])
        if result.ensemble_scores is not None:
            figures = [cell for split in splits for cell in (_figure(result.ensemble_scores[split]), "")]
            rows.append([f"{result.method}, ensemble of the members", *figures, ""])
    return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """
    Lay out a table in markdown.

    Args:
        rows (`Sequence[Sequence[str]]`):
            The cells, the header first. The first column is aligned to the left, all others to the right.

    Returns:
        `str`: The table.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_curves(
    results: Sequence[Result], average: str, late_phase_start: int, ylabel: str, path: Path, measure: str = "bpc"
) -> None:
    """
    Plot the curves of all methods, with T0 marked.

    Args:
        results (`Sequence[Result]`):
            The methods; one without a curve is left out.
        average (`str`):
            What the average over time is called.
        late_phase_start (`int`):
            T0, in steps.
        ylabel (`str`):
            What the curves show.
        path (`Path`):
            The PNG to write.
        measure (`str`, defaults to `"bpc"`):
            What the points of the curves call it; less is better. With `_averaged` behind it: averaged over time.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, result in enumerate(results):
        colour = f"C{index}"
        axes.plot(*_line(result.curve, measure), color=colour, label=result.method)
        if result.averaged_scores is not None:
            averaged = _line(result.curve, f"{measure}_averaged")
            axes.plot(*averaged, color=colour, linestyle="--", label=f"{result.method}, {average}")
    axes.axvline(late_phase_start, color="grey", linestyle=":", label="T0")
    # The first points lie far above all others and would flatten what the plot is about.
    values = sorted(point[measure] for result in results for point in result.curve)
    if values:
        axes.set_ylim(top=values[int(0.9 * (len(values) - 1))] * 1.02)
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(results: Sequence[Result], average: str, settings: dict[str, Any], note: str, folder: Path) -> str:
    """
    Write `results.json` and `results.md`.

    Args:
        results (`Sequence[Result]`):
            The rows.
        average (`str`):
            What the average over time is called.
        settings (`dict[str, Any]`):
            What the figures belong to.
        note (`str`):
            How to read the table.
        folder (`Path`):
            Where the two files go; made if need be.

    Returns:
        `str`: The table with its note, in markdown.
    """
    table = f"{markdown_table(results, average)}\n\n{note}\n"
    content = {"settings": settings, "results": [asdict(result) for result in results]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table, encoding="utf-8")
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _line(curve: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [point for point in curve if name in point]
    return [point["step"] for point in points], [point[name] for point in points]
