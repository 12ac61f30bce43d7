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
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


# Of Okabe and Ito: colour-blind people tell them apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


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
    Plot the curves of all methods: the whole of training, and beside it the late phase enlarged.

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
    figure = draw_curves(results, average, late_phase_start, ylabel, measure)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(
    results: Sequence[Result], average: str, late_phase_start: int, ylabel: str, measure: str = "bpc"
) -> Figure:
    """
    Draw what [`plot_curves`] writes, with its arguments.

    Returns:
        `Figure`: Training as a whole and, if the curves go on for two points from T0 on, the late phase beside it.
    """
    curves = _curves(results, average, measure)
    late = any(sum(step >= late_phase_start for step in curve.steps) > 1 for curve in curves)
    panels = ("The whole of training", f"From T0 on (step {late_phase_start:,})")[: 1 + late]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 + 5 * len(panels), 5), layout="constrained", squeeze=False)
    for panel, title in zip(axes[0], panels, strict=True):
        for curve in curves:
            panel.plot(
                curve.steps, curve.values, color=curve.colour, linestyle=curve.style, linewidth=curve.width,
                marker="o", markersize=curve.width + 1, label=curve.label,
            )  # fmt: skip
        panel.set(xlabel="training step", title=title)
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].axvline(late_phase_start, color="black", linestyle=":", linewidth=1)
    # The first points lie far above all others and would flatten what the plot is about.
    values = sorted(value for curve in curves for value in curve.values)
    if values:
        axes[0, 0].set_ylim(top=values[int(0.9 * (len(values) - 1))] * 1.02)
    axes[0, 0].annotate(
        "T0", (late_phase_start, 1), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points"
    )
    if late:
        _enlarge(axes[0, 1], curves, late_phase_start)
    _label_ends(axes[0, -1], curves)
    return figure


@dataclass
class _Curve:
    label: str
    steps: list[float]
    values: list[float]
    colour: str
    style: str
    width: float


def _curves(results: Sequence[Result], average: str, measure: str) -> list[_Curve]:
    """The lines, the widest first: where two are equal, both are seen."""
    curves = []
    for index, result in enumerate(results):
        colour = COLOURS[index % len(COLOURS)]
        width = 1.2 + 4 * (1 - index / max(len(results) - 1, 1))
        curves.append(_Curve(result.method, *_line(result.curve, measure), colour, "-", width))
        if result.averaged_scores is not None:
            points = _line(result.curve, f"{measure}_averaged")
            curves.append(_Curve(f"{result.method}, {average}", *points, colour, "--", width))
    return [curve for curve in curves if curve.steps]


def _enlarge(axes: Axes, curves: Sequence[_Curve], start: float) -> None:
    points = [(s, v) for curve in curves for s, v in zip(curve.steps, curve.values, strict=True) if s >= start]
    last, lowest, highest = max(s for s, _ in points), min(v for _, v in points), max(v for _, v in points)
    margin = 0.05 * (highest - lowest) or 0.05
    axes.set(xlim=(start, last + 0.02 * (last - start)), ylim=(lowest - margin, highest + margin))


def _label_ends(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Writes each curve's name beside its end, with a line to it where names had to be moved apart."""
    low, high = axes.get_ylim()
    ordered = sorted(curves, key=lambda curve: curve.values[-1])
    wanted = [(curve.values[-1] - low) / (high - low) for curve in ordered]
    for curve, height in zip(ordered, apart(wanted, min(0.05, 1 / max(len(wanted), 1))), strict=True):
        axes.annotate(
            curve.label, (curve.steps[-1], curve.values[-1]), xytext=(1.06, height), textcoords="axes fraction",
            va="center", color=curve.colour, annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": curve.colour, "linestyle": curve.style, "linewidth": 0.8,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """
    Moves heights apart.

    Args:
        wanted (`Sequence[float]`):
            Heights between 0 and 1, ascending.
        gap (`float`):
            What neighbours should keep, at most 1 / len(wanted).

    Returns:
        `list[float]`: Heights in the same order, at least a gap from each other, near those that were wanted.
    """
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else max(height, 0.0))
    ceiling = 1.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    return heights


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
