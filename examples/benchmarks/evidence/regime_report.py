"""The tables and the figure of `regime.py`, made from its recorded figures."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch


matplotlib.use("Agg")  # before pyplot: the machine may have no display

from matplotlib import pyplot as plt  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where `common` is
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "toy"))

from common.report import COLOURS
from quadratic_theory import Method, NoisyQuadratic, steady_state_loss
from regime_settings import AVERAGED as SWA
from regime_settings import LONGER, LONGER_SEEDS, TASKS
from runs import README, RESULTS, RESULTS_PAGE, difference, markdown, put_into_page, spread


PLOT = RESULTS_PAGE.with_name("noise.png")
BASE, ONE = "base", "one member (rank-1)"


def figures_of(name: str) -> Path:
    """Where the figures of a task are kept."""
    return Path(__file__).with_name(f"regime_{name}.json")


@dataclass
class Figures:
    """
    The recorded runs of a task.

    Attributes:
        runs (`list[dict[str, Any]]`): One a run.
    """

    runs: list[dict[str, Any]]

    @classmethod
    def of(cls, name: str) -> Figures:
        """Those of a task, none if it has not run."""
        path = figures_of(name)
        return cls(json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else [])

    def __bool__(self) -> bool:
        return bool(self.runs)

    def of_method(self, method: str, rate: float, batch_size: int | None = None) -> list[dict[str, Any]]:
        """The runs of a method at a rate (and a size of minibatches), by seed."""
        own = [
            run
            for run in self.runs
            if (run["method"], run["rate"]) == (method, rate) and batch_size in (None, run["batch_size"])
        ]
        return sorted(own, key=lambda run: run["seed"])

    def first_choice(self, method: str, averaged: str, measure: str) -> float:
        """The rate at which the first seed is best on validation, with the final weights or with their average."""
        tried = [run for run in self.runs if (run["method"], run["seed"]) == (method, 0)]
        best = min(tried, key=lambda run: run[f"validation{averaged}"][measure])
        return float(best["rate"])

    def chosen_rate(self, method: str, averaged: str, measure: str) -> float:
        """The rate that is best on validation in the mean of all seeds, of those at which all have run."""
        rates = sorted({run["rate"] for run in self.runs if run["method"] == method})
        found = {rate: self.values(method, rate, f"validation{averaged}", measure) for rate in rates}
        most = max(map(len, found.values()))
        return min((statistics.mean(own), rate) for rate, own in found.items() if len(own) == most)[1]

    def values(self, method: str, rate: float, split: str, measure: str, batch_size: int | None = None) -> list[float]:
        """A measure by seed; accuracies in per cent."""
        scale = 100 if measure == "accuracy" else 1
        own = self.of_method(method, rate, batch_size)
        return [scale * run[split][measure] for run in own if split in run]


def ahead(own: Sequence[float], other: Sequence[float], digits: int = 3, higher: bool = False) -> str:
    """By how much the first is better than the second, with its 95 % interval, over the seeds (from 0) of both."""
    own, other = own[: len(other)], other[: len(own)]
    if own == other or len(own) < 2:
        return "–"
    mean, width = difference(own, other) if higher else difference(other, own)
    return f"{mean:+.{digits}f} ± {width:.{digits}f}"


def comparison(name: str, measures: dict[str, tuple[str, int]], controls: dict[str, str], tuned: bool = False) -> str:
    """
    A task's methods with SWA and without, and how far they are ahead of controls.

    Args:
        name (`str`): The task.
        measures (`dict[str, tuple[str, int]]`): What is compared: its column's title, and how many digits it has.
        controls (`dict[str, str]`): The methods to be ahead of, by what columns call them.
        tuned (`bool`): Whether each is at the rate that validation chose, or all at the one that they share.
    """
    figures, task = Figures.of(name), TASKS[name]

    def rate(method: str, averaged: str) -> float:
        return figures.chosen_rate(method, averaged, task.measure) if tuned else task.rate

    lines = []
    for method, settings in task.methods.items():
        if settings.average != "SWA" or (settings.tuned if tuned else settings.shared) < 2:
            continue
        cells = [method]
        for averaged in settings.results:
            cells += [f"{rate(method, averaged):g}"] if tuned else []
            for measure, (_, digits) in measures.items():
                own, *others = (
                    figures.values(of, rate(of, averaged), f"test{averaged}", measure)
                    for of in (method, *controls.values())
                )
                higher = measure == "accuracy"
                cells += [spread(own, digits), *(ahead(own, other, digits, higher) for other in others)]
        lines.append([*cells, str(len(own))])
    columns = ["rate"] if tuned else []
    columns += [
        column for title, _ in measures.values() for column in (title, *(f"ahead of {one}" for one in controls))
    ]
    return markdown(["method", *columns, *(f"SWA: {column}" for column in columns), "seeds"], 1, lines)


# ---- noise ----

NOISE_METHODS = {
    "base, SWA": (BASE, SWA),
    "base, linear decay": ("base, linear decay", ""),
    "accumulation (plain)": ("accumulation (plain)", ""),
    "late-phase head": ("late-phase head", ""),
}
Noise = tuple[int, float]  # windows in a minibatch, rate


def predicted_gain(noise: Noise, adam: bool) -> float:
    """
    What members gain over plain training on the noisy quadratic problem, in units of that at the LSTM's own noise.

    The closed form is SGD's. Adam divides its steps by the gradients' size; where that is noise, it falls with the
    root of the minibatch, so that Adam is SGD at a rate that grows with that root.

    Args:
        noise (`tuple[int, float]`):
            Windows in a minibatch, and the rate.
        adam (`bool`):
            Whether the rate grows so.
    """
    hessian = torch.diag(1 / torch.arange(1, 11, dtype=torch.float64))
    task = TASKS["lstm"]

    def gain(size: int, rate: float) -> float:
        # Gradients have covariance H / size: those of a likelihood.
        problem = NoisyQuadratic(hessian, torch.linalg.inv(hessian) / size)
        rate *= 0.1 / task.rate * (math.sqrt(size / task.batch_size) if adam else 1)
        base, averaged = Method("base", 1, 0), Method("late-phase, γ = 1/K", 10, 5, 1 / 10)
        return steady_state_loss(problem, base, rate) - steady_state_loss(problem, averaged, rate)

    return gain(*noise) / gain(task.batch_size, task.rate)


def all_runs() -> Figures:
    """The LSTM's, at all noise."""
    return Figures(Figures.of("lstm").runs + Figures.of("noise").runs)


def noises() -> list[Noise]:
    """What there are, the most first."""
    found = {(run["batch_size"], run["rate"]) for run in all_runs().runs}
    return sorted(found, key=lambda noise: -predicted_gain(noise, adam=True))


def gains(method: str, averaged: str = "") -> dict[Noise, list[float]]:
    """How far a method is ahead of the base without an average, by seed."""
    figures, found = all_runs(), {}
    for size, rate in noises():
        base = {run["seed"]: run["test"]["bpc"] for run in figures.of_method(BASE, rate, size)}
        own = {run["seed"]: run[f"test{averaged}"]["bpc"] for run in figures.of_method(method, rate, size)}
        if pairs := [base[seed] - own[seed] for seed in sorted(base.keys() & own.keys())]:
            found[size, rate] = pairs
    return found


def own_gain() -> float:
    """Of the members, at the LSTM's own noise."""
    return statistics.mean(gains("late-phase head")[TASKS["lstm"].batch_size, TASKS["lstm"].rate])


def noise_table() -> str:
    """The gains over the base by noise, measured and predicted."""
    found = {name: gains(*which) for name, which in NOISE_METHODS.items()}
    lines = []
    for noise in noises():
        size, rate = noise
        base = all_runs().values(BASE, rate, "test", "bpc", size)
        cells = [spread(own[noise]) if noise in own else "–" for own in found.values()]
        predicted = [f"{own_gain() * predicted_gain(noise, adam):.3f}" for adam in (False, True)]
        lines.append([str(size), f"{rate:g}", spread(base), *cells, *predicted, str(len(base))])
    header = ["windows", "rate", "base", *(f"{name}: gain" for name in NOISE_METHODS), "predicted, SGD"]
    return markdown([*header, "predicted, Adam", "seeds of base"], 2, lines)


def draw_noise(path: Path) -> None:
    """The gains over the base against the noise of gradients."""
    figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    axes.axhline(0, color="0.6", linewidth=1)
    x = {noise: predicted_gain(noise, adam=True) for noise in noises()}
    ends = []  # of lines: height, name, colour
    for shift, (colour, marker, (name, which)) in enumerate(zip(COLOURS, "os^D", NOISE_METHODS.items(), strict=False)):
        found = gains(*which)
        means = [statistics.mean(own) for own in found.values()]
        errors = [statistics.stdev(own) if len(own) > 1 else 0 for own in found.values()]
        places = [x[noise] * 1.015 ** (shift - 1.5) for noise in found]  # so that no bar hides another
        axes.errorbar(places, means, errors, color=colour, marker=marker, capsize=3, markersize=5)
        ends.append((means[0], name, colour))
    places = list(x.values())
    axes.plot(places, [own_gain() * place for place in places], color="0.35", linestyle="--")
    ends.append((own_gain() * places[0], "members, predicted", "0.35"))
    height = -math.inf
    for end, name, colour in sorted(ends):
        height = max(end, height + 0.013)  # so that no name hides another
        axes.annotate(name, (places[0] * 1.06, height), color=colour, va="center", fontsize=9)
    axes.set_xscale("log")
    names = [f"{rate:g}, {size} windows" for size, rate in x]
    axes.set_xticks(places, names, fontsize=5.5, rotation=90)  # some places are close to each other
    axes.minorticks_off()
    axes.set_xlim(min(places) * 0.9, max(places) * 1.75)
    axes.set_xlabel("rate and size of a minibatch, by the noise that Adam's steps carry: rate / √windows")
    axes.set_ylabel("gain over base, bits per character")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


# ---- more minibatches ----


def steps_table() -> str:
    """What twice as many minibatches bring each method, at the rate that validation chooses for either number."""
    task = TASKS["lstm"]
    counts = {f"{task.steps:,}": Figures.of("lstm"), f"{2 * task.steps:,}": Figures.of("steps")}
    lines = []
    for method in LONGER:
        for averaged in task.methods[method].results:
            cells, found = [], []
            for figures in counts.values():
                rates = [figures.chosen_rate(of, averaged, task.measure) for of in (method, BASE)]
                own, base = (
                    figures.values(of, rate, f"test{averaged}", task.measure)[:LONGER_SEEDS]
                    for of, rate in zip((method, BASE), rates, strict=True)
                )
                cells += [f"{rates[0]:g}", spread(own), ahead(own, base)]
                found.append(own)
            lines.append([method + averaged, *cells, ahead(*reversed(found)), str(len(own))])
    columns = [f"{count}: {column}" for count in counts for column in ("rate", "test", "ahead of base")]
    return markdown(["method", *columns, "gain", "seeds"], 1, lines)


# ---- what to use ----


# What figures are called, the measure of each, and its digits.
RANKED = {
    "lstm": ("bits per character", "bpc", 3),
    "enwik6": ("bits per character", "bpc", 3),
    "gpt2": ("bits per character", "bpc", 3),
    "cifar": ("accuracy in per cent", "accuracy", 2),
}


def best_first(name: str) -> list[tuple[str, list[float]]]:
    """A task's methods, each at the rate that validation chose for it; the best mean on test first."""
    figures, task, (_, measure, _) = Figures.of(name), TASKS[name], RANKED[name]
    found = {
        method + averaged * (settings.average == "SWA"): figures.values(
            method, figures.chosen_rate(method, averaged, task.measure), f"test{averaged}", measure
        )
        for method, settings in task.methods.items()
        if max(settings.shared, settings.tuned) > 2
        for averaged in settings.results
    }
    sign = -1 if measure == "accuracy" else 1
    return sorted(found.items(), key=lambda item: sign * statistics.mean(item[1]))


def what_to_use() -> str:
    """All that cost the same, the best first, with its distance from the best."""
    lines = []
    for name, (unit, measure, digits) in RANKED.items():
        ranked = best_first(name)
        for key, own in ranked:
            behind = ahead(ranked[0][1], own, digits, higher=measure == "accuracy")
            lines.append([f"{name}, {unit}", key, spread(own, digits), behind, str(len(own))])
    return markdown(["", "method", "test", "behind the best by", "seeds"], 2, lines)


# ---- the demo ----

# By the demo's name, what it is called here.
DEMO = {"late_phase": "late-phase head", "base": "base", "accumulation": "accumulation (plain)"}


def demo() -> str:
    """What `make demo` shows, over all seeds; one member of a head is the base."""
    figures, rate = Figures.of("lstm"), TASKS["lstm"].rate
    late = figures.values(DEMO["late_phase"], rate, "test", "bpc")
    lines = []
    for method, key in DEMO.items():
        own, averaged = (figures.values(key, rate, f"test{which}", "bpc") for which in ("", SWA))
        cells = [spread(own), ahead(late, own), spread(averaged), ahead(late, averaged)]
        lines.append([f"`{method}`", *cells, str(len(own))])
    columns = ("at the end", "late-phase ahead by", "with SWA", "late-phase ahead by", "seeds")
    header = ["bits per character, on test", *columns]
    return markdown(header, 1, lines)


BITS, IMAGES = {"bpc": ("test", 3)}, {"accuracy": ("accuracy", 2), "nll": ("NLL", 3)}
CONTROLS = {"base": BASE, "one member": ONE}
# Where each table stands.
TABLES = {
    "regime_lstm_tuned": (lambda: comparison("lstm", BITS, CONTROLS, tuned=True), (RESULTS_PAGE, RESULTS)),
    "regime_lstm": (lambda: comparison("lstm", BITS, CONTROLS), (RESULTS_PAGE, RESULTS)),
    "regime_enwik6": (lambda: comparison("enwik6", BITS, CONTROLS, tuned=True), (RESULTS_PAGE, RESULTS)),
    "regime_gpt2": (lambda: comparison("gpt2", BITS, CONTROLS, tuned=True), (RESULTS_PAGE, RESULTS)),
    "regime_cifar": (lambda: comparison("cifar", IMAGES, {"base": BASE}, tuned=True), (RESULTS_PAGE, RESULTS)),
    "regime_noise": (noise_table, (RESULTS_PAGE, RESULTS)),
    "regime_steps": (steps_table, (RESULTS_PAGE, RESULTS)),
    "what_to_use": (what_to_use, (RESULTS_PAGE, RESULTS)),
    "demo": (demo, (README,)),
}


def write_report() -> None:
    """Writes all tables and the figure anew, as soon as every task that they need has run."""
    if not all(map(Figures.of, (*TASKS, "noise", "steps"))):
        return
    for mark, (table, pages) in TABLES.items():
        for page in pages:
            put_into_page(page, mark, table())
    draw_noise(PLOT)
