"""
Simulates late-phase training on the noisy quadratic problem, beside the closed form of its steady-state loss.

    python examples/toy/noisy_quadratic.py
    python examples/toy/noisy_quadratic.py --learning_rate 0.05 --num_members 2 4 8 --late_share 0.2

The problem, the methods and the derivation: `quadratic_theory.py`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm


matplotlib.use("Agg")  # before pyplot: the machine may have no display

from matplotlib import pyplot as plt  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `common` is

from common.recipe import parse_arguments
from quadratic_theory import Method, NoisyQuadratic, late_phase, methods, simulate, steady_state_loss


@dataclass
class Arguments:
    """The problem, the methods and how long to measure."""

    output_dir: str = field(
        default="outputs/noisy_quadratic", metadata={"help": "Where results.json and plot.png go."}
    )
    num_members: list[int] = field(default_factory=lambda: [2, 5, 10], metadata={"help": "The values of K."})
    learning_rate: float = field(default=0.1, metadata={"help": "eta, of base weights and members."})
    dimension: int = field(default=10, metadata={"help": "n, the number of weights."})
    late_share: float = field(default=0.5, metadata={"help": "Share of the weights that are late-phase weights."})
    spectrum_decay: float = field(default=1.0, metadata={"help": "p: eigenvalue i of H is i ** -p, i = 1 ... n."})
    noise: float = field(
        default=1.0,
        metadata={"help": "s: Sigma is s ** 2 * inverse(H), so that gradients have covariance s ** 2 * H."},
    )
    coupled: bool = field(
        default=True,
        metadata={"help": "Turn the eigenvectors of H at random; else they are the weights, the flattest late-phase."},
    )
    replicas: int = field(default=500, metadata={"help": "Independent runs of each method."})
    num_updates: int = field(default=1000, metadata={"help": "Updates measured in each run."})
    seed: int = field(default=0, metadata={"help": "Of the problem's eigenvectors and the noise."})

    def __post_init__(self) -> None:
        if self.dimension < 2 or not 0 < self.num_late < self.dimension:
            raise ValueError(
                f"dimension={self.dimension} and late_share={self.late_share} give {self.num_late} late-phase "
                "weights. At least one must be, and one not: choose a larger dimension or another share."
            )
        for name in ("learning_rate", "noise"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}.")
        if not math.isfinite(self.spectrum_decay):
            raise ValueError(f"spectrum_decay must be finite, got {self.spectrum_decay}.")
        if not self.num_members or min(self.num_members) < 2:
            raise ValueError(f"num_members must be values of K from 2 on, got {self.num_members}: 1 is base SGD.")
        if self.replicas < 2 or self.num_updates < 1:
            raise ValueError(
                f"replicas must be at least 2 and num_updates at least 1, got {self.replicas} and {self.num_updates}."
            )
        self.num_members = sorted(set(self.num_members))

    @property
    def num_late(self) -> int:
        """How many weights are late-phase weights."""
        return round(self.late_share * self.dimension)

    def problem(self) -> NoisyQuadratic:
        """Builds the problem."""
        eigenvalues = torch.arange(1, self.dimension + 1, dtype=torch.float64) ** -self.spectrum_decay
        vectors = torch.eye(self.dimension, dtype=torch.float64)
        if self.coupled:
            generator = torch.Generator().manual_seed(self.seed)
            shape = (self.dimension, self.dimension)
            vectors = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
        hessian = vectors * eigenvalues @ vectors.T
        noise = self.noise**2 * (vectors / eigenvalues @ vectors.T)
        return NoisyQuadratic((hessian + hessian.T) / 2, (noise + noise.T) / 2)


@dataclass
class Row:
    """The steady-state loss of one method with K minibatches to an update; the standard error is the simulation's."""

    method: str
    num_members: int
    closed_form: float
    simulated: float
    standard_error: float

    @property
    def deviation(self) -> float:
        """Of the simulation from the closed form, relative to that."""
        return self.simulated / self.closed_form - 1


def markdown_table(rows: Sequence[Row]) -> str:
    """The results as a table in markdown."""
    lines = [
        f"| {'method':<19} | minibatches per update | closed form |  simulated | standard error | deviation |",
        f"| {'-' * 19} | {'-' * 21}: | {'-' * 10}: | {'-' * 9}: | {'-' * 13}: | {'-' * 8}: |",
    ]
    for row in rows:
        error = row.standard_error / row.closed_form
        lines.append(
            f"| {row.method:<19} | {row.num_members:>22} | {row.closed_form:>11.5g} | {row.simulated:>10.5g} | "
            f"{error:>14.2%} | {row.deviation:>+9.2%} |"
        )
    return "\n".join(lines)


def plot(arguments: Arguments, problem: NoisyQuadratic, rows: Sequence[Row], path: Path) -> None:
    """
    Plot the steady-state loss against K: closed forms as lines, simulations as points.

    Args:
        arguments (`Arguments`), problem ([`NoisyQuadratic`]), rows (`Sequence[Row]`):
            What was simulated.
        path (`Path`):
            The PNG to write.
    """
    rate, num_late = arguments.learning_rate, arguments.num_late
    base, *rest = rows
    ks = list(range(1, arguments.num_members[-1] + 1))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(base.closed_form, color="C7")
    axes.plot(1, base.simulated, "D", color="C7", markersize=7, label=base.method)
    # Three methods share one line: markers that go inside one another show all of them.
    styles = {"late-phase, γ = 1": ("C1", "o", 7), "late-phase, γ = 1/K": ("C0", "o", 4)}
    styles |= {"full ensemble": ("C2", "s", 9), "K-fold batch": ("C3", "o", 15)}
    for name, (colour, marker, size) in styles.items():
        points = [row for row in rest if row.method == name]
        filled = name.startswith("late-phase")
        axes.plot(
            [row.num_members for row in points],
            [row.simulated for row in points],
            marker,
            color=colour,
            markersize=size,
            markerfacecolor=colour if filled else "none",
            markeredgewidth=1.5,
            label=name,
        )
    for averaged, colour in ((False, "C1"), (True, "C0")):
        curve = [steady_state_loss(problem, late_phase(k, num_late, averaged), rate) for k in ks]
        axes.plot(ks, curve, color=colour, zorder=1)
    axes.plot([], [], color="black", label="closed form")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({1, *arguments.num_members})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("K, minibatches per update")
    axes.set_ylabel("steady-state loss of the averaged model")
    axes.set_title(f"Noisy quadratic, {arguments.dimension} weights, {num_late} of them late-phase, η = {rate:g}")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(arguments: Arguments, problem: NoisyQuadratic) -> list[Row]:
    """
    Simulate every method, base SGD first.

    Raises:
        `ValueError`: If one of them diverges; nothing is simulated then.
    """
    rate = arguments.learning_rate
    settings = [Method("base SGD", 1, 0)]
    for num_members in arguments.num_members:
        settings += methods(num_members, arguments.num_late, problem.size)
    expected = [steady_state_loss(problem, method, rate) for method in settings]
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = []
    progress = tqdm(settings, unit="method")
    for method, closed_form in zip(progress, expected, strict=True):
        progress.set_description(f"{method.name}, K = {method.num_members}")
        measured = simulate(problem, method, rate, arguments.replicas, arguments.num_updates, generator)
        rows.append(Row(method.name, method.num_members, closed_form, *measured))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Simulates, prints the table, and writes `results.json` and `plot.png`."""
    (arguments,) = parse_arguments([Arguments], argv, __doc__)
    problem = arguments.problem()
    rows = run(arguments, problem)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"settings": asdict(arguments), "results": [asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(arguments, problem, rows, folder / "plot.png")
    print(f"{markdown_table(rows)}\n\nIn {folder}: results.json, plot.png.")


if __name__ == "__main__":
    main()
