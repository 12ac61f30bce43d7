"""
Late-phase image classifiers against their controls and baselines over several seeds.

    python examples/benchmarks/evidence/image_classifiers.py --dataset path/to/cifar10

Every run is `examples/vision/run_cifar.py` with the recipe `benchmark_cifar.yaml`, in a folder of its own; runs
that have finished are not repeated, so an interrupted benchmark goes on where it was. The deep ensemble, which trains
K models, is run for the first seed only. The figures go to `image_classifiers.json` beside this file; the table made
from them to `image_classifiers.md` and into `docs/results.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from runs import RESULTS_PAGE, Run, collect, markdown, run_all, spread, write_figures


RESULTS = Path(__file__).with_name("image_classifiers.json")
RECIPE = Path(__file__).with_name("recipes") / "benchmark_cifar.yaml"
SWA = ["--swa_start=0.8", "--swa_every=0.02"]
EMA = ["--ema_decay=0.98", "--ema_start=0"]  # per update, as in `evidence_tables.py`
# Of one run each; those that share a run stand together.
GROUPS = (
    ("base", "swa"),
    ("late_phase",),
    ("accumulation",),
    ("dropout", "mc_dropout"),
    ("batch_ensemble",),
    ("late_phase_t0",),
    ("late_phase_full",),
    ("late_phase_hypernet",),
)
# Run once more, since an average over time is one or the other.
EMA_METHODS = ("base", "late_phase")
MEASURES = {"accuracy": "accuracy", "nll": "NLL", "brier_score": "Brier", "calibration_error": "ECE"}


@dataclass
class BenchmarkArguments:
    """What is run, and where."""

    dataset: str | None = field(
        default=None, metadata={"help": "The images, as in run_cifar.py. Default: scikit-learn's digits."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    deep_ensemble: bool = field(default=True, metadata={"help": "Whether to train one, for the first seed."})
    max_steps: int | None = field(default=None, metadata={"help": "Instead of the recipe's."})
    output_dir: str = field(
        default="outputs/image_classifiers", metadata={"help": "Where the runs keep their models."}
    )
    workers: int = field(default=2, metadata={"help": "Runs side by side, each on one thread."})


def make_run(arguments: BenchmarkArguments, methods: tuple[str, ...], seed: int, average: list[str] = SWA) -> Run:
    """One run of some methods, with an average over time."""
    flags = ["--method", *methods, f"--seed={seed}", *average]
    if arguments.dataset is not None:
        flags.append(f"--dataset={arguments.dataset}")
    if arguments.max_steps is not None:
        flags.append(f"--max_steps={arguments.max_steps}")
    folder = Path(arguments.output_dir) / f"{methods[0]}{'-ema' if average == EMA else ''}-{seed}"
    return Run(folder, "run_cifar.py", [str(RECIPE), *flags], {"seed": seed})


def records_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is recorded of a run: of one with EMA only the averages, since the rest is there from the one with SWA."""
    records = []
    has_ema = report["settings"]["ema_decay"] is not None
    for result in report["results"]:
        if has_ema and "EMA" not in result["variant"]:
            continue
        if result["method"] == "base" and "SWA" in result["variant"]:
            continue  # is swa
        name = ", ".join(filter(None, (result["method"], result["variant"])))
        outside = {f"OOD {key}": value for key, value in result["ood_auroc"].items()}
        records.append({"method": name, "minutes": result["minutes"]} | result["scores"]["test"] | outside)
    return records


def rows(records: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Mean and standard deviation over the seeds."""
    columns = measures(records)
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        accuracy = spread([100 * record["accuracy"] for record in own], digits=2)
        yield [method, accuracy, *(spread([r[c] for r in own]) for c in columns[1:]), str(len(own))]


def measures(records: list[dict[str, Any]]) -> list[str]:
    """The columns of the table."""
    return [*MEASURES, *(name for name in records[0] if name.startswith("OOD "))]


def table(records: list[dict[str, Any]]) -> str:
    """The figures in Markdown; accuracy in per cent."""
    header = ["method", *(MEASURES.get(name, name) for name in measures(records)), "seeds"]
    return markdown(header, 1, list(rows(records)))


def main() -> None:
    """Runs what is missing and writes figures and table."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    # Seed by seed, so that an interrupted benchmark has every method.
    runs = [make_run(arguments, methods, seed) for seed in arguments.seeds for methods in GROUPS]
    runs += [make_run(arguments, (method,), seed, EMA) for seed in arguments.seeds for method in EMA_METHODS]
    if arguments.deep_ensemble:
        # First, since it takes the longest.
        runs.insert(0, make_run(arguments, ("deep_ensemble",), arguments.seeds[0]))
    run_all(runs, arguments.workers)
    figures = collect(runs, records_of, ("torch", "torchvision", "transformers"))
    write_figures(__file__, figures, table(figures["runs"]), RESULTS_PAGE)


if __name__ == "__main__":
    main()
