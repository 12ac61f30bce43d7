"""
Draws a cycle for README and documentation: which weights a minibatch sees, and who steps when.

    python docs/draw_cycle.py               # writes docs/cycle.svg
    python docs/draw_cycle.py cycle.png     # or another file
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # before pyplot: the machine may have no display

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402


DRAWING = Path(__file__).resolve().with_name("cycle.svg")
MEMBERS = ("#0072b2", "#d55e00", "#007d5a")  # told apart by colour-blind people, too
BASE, SHARED, TEXT = "#4a4a4a", "#767676", "#202020"
# Rows, from the top: minibatches, members, base.
MINIBATCH, MEMBER, WEIGHTS = 3.0, 1.9, 0.8


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 0.8, filled: bool = True) -> None:
    """Draws a rounded box around a point."""
    face = color if filled else "white"
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.22),
            width,
            0.44,
            boxstyle="round,pad=0.02",
            facecolor=face,
            edgecolor=color,
            linewidth=1.5,
        )
    )
    axes.text(x, y, text, ha="center", va="center", color="white" if filled else color, fontsize=11)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, dashed: bool = False) -> None:
    """Draws an arrow from point to point."""
    style = "--" if dashed else "-"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.3, linestyle=style)
    )


def heading(axes: Axes, left: float, right: float, text: str) -> None:
    """Writes what a part of training is, over it."""
    axes.text((left + right) / 2, 3.95, text, ha="center", va="center", color=TEXT, fontsize=12, weight="bold")
    axes.plot([left, right], [3.65, 3.65], color=SHARED, linewidth=1)


def before(axes: Axes, x: float) -> None:
    """Draws plain training: every minibatch sees the one set of weights, and all weights step after it."""
    heading(axes, x - 0.5, x + 1.5, "before T0")
    for step in range(2):
        box(axes, x + step, MINIBATCH, f"$M_{step + 1}$", SHARED, filled=False)
        box(axes, x + step, MEMBER, r"$\varphi_0$", SHARED)
        box(axes, x + step, WEIGHTS, r"$\theta$", BASE)
        arrow(axes, (x + step, MINIBATCH - 0.25), (x + step, MEMBER + 0.25), SHARED)
        axes.text(x + step, 0.1, "step", ha="center", va="center", color=TEXT, fontsize=9)


def cycle(axes: Axes, x: float) -> None:
    """Draws a cycle of three minibatches, each with its own member, after which base and members step."""
    heading(axes, x - 0.5, x + 4.5, "one cycle after T0 (K = 3 members)")
    for k, color in enumerate(MEMBERS):
        box(axes, x + k, MINIBATCH, f"$M_{k + 1}$", color, filled=False)
        box(axes, x + k, MEMBER, rf"$\varphi_{k + 1}$", color)
        arrow(axes, (x + k, MINIBATCH - 0.25), (x + k, MEMBER + 0.25), color)
        arrow(axes, (x + k, MEMBER - 0.25), (x + k, WEIGHTS + 0.25), color, dashed=True)
        axes.text(x + k + 0.08, 1.35, rf"$\Delta\theta_{k + 1}$", color=color, fontsize=10, va="center")
    box(axes, x + 1, WEIGHTS, r"$\theta$: the same for all three", BASE, width=2.8)
    for y, text in ((MEMBER, "each member steps\nby its own gradient"), (WEIGHTS, "the base steps\nby all gradients")):
        axes.text(x + 3.6, y, text, color=TEXT, ha="center", va="center", fontsize=10)
    axes.text(x + 1, 0.1, "one step after all three minibatches", ha="center", va="center", color=TEXT, fontsize=9)


def at_the_end(axes: Axes, x: float) -> None:
    """Draws the saved model."""
    heading(axes, x - 0.9, x + 0.9, "at the end")
    for k, color in enumerate(MEMBERS):
        box(axes, x + 0.6 * (k - 1), MEMBER, rf"$\varphi_{k + 1}$", color, width=0.45)
        arrow(axes, (x + 0.6 * (k - 1), MEMBER - 0.25), (x + 0.3 * (k - 1), WEIGHTS + 0.25), color)
    box(axes, x, WEIGHTS, r"$\theta$, mean of $\varphi_k$", BASE, width=1.9)
    axes.text(x, 0.1, "one stock model", ha="center", va="center", color=TEXT, fontsize=9)


def main(path: Path = DRAWING) -> None:
    """Draws, and writes the file."""
    # A drawing that is the same each time: no date, no random names.
    with plt.rc_context({"svg.hashsalt": "cycle", "mathtext.fontset": "dejavusans"}):
        figure, axes = plt.subplots(figsize=(11, 4))
        before(axes, 1.6)
        cycle(axes, 4.3)
        at_the_end(axes, 10.4)
        for y, name in (
            (MINIBATCH, "minibatch"),
            (MEMBER, r"late-phase" "\n" r"weights $\varphi$"),
            (WEIGHTS, "base\n" r"weights $\theta$"),
        ):
            axes.text(0.0, y, name, ha="left", va="center", color=TEXT, fontsize=10)
        axes.set(xlim=(-0.1, 11.5), ylim=(-0.2, 4.3), aspect="equal")
        axes.axis("off")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            path, bbox_inches="tight", facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None
        )
        plt.close(figure)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
