"""
Late-phase language models against their controls: two architectures, two schedules, several seeds.

    python examples/benchmarks/evidence/language_models.py --data_file enwik6

Every run is `run_enwik8.py` with a recipe, in a folder of its own; runs that have finished are not repeated, so an
interrupted benchmark goes on where it was. The figures of all runs are written to `language_models.json` beside this
file; the table made from them goes to `language_models.md` and into `docs/results.md`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from runs import RESULTS_PAGE, Run, collect, markdown, run_all, spread, write_figures


RESULTS = Path(__file__).with_name("language_models.json")
SCHEDULES = {"constant rate": "false", "linear decay from T0": "true"}
METHODS = ("base", "one_member", "accumulation", "late_phase")


@dataclass
class BenchmarkArguments:
    """What is run, and where."""

    data_file: str | None = field(
        default=None, metadata={"help": "The text. Default: Python's language reference, which needs no file."}
    )
    models: list[str] = field(default_factory=lambda: ["lstm", "gpt2"], metadata={"help": "Recipes benchmark_*.yaml."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output_dir: str = field(default="outputs/language_models", metadata={"help": "Where the runs keep their models."})
    workers: int = field(default=2, metadata={"help": "Runs side by side, each on one thread."})


def make_run(arguments: BenchmarkArguments, model: str, schedule: str, seed: int) -> Run:
    """One run of all methods."""
    flags = [f"--seed={seed}", f"--decay_after_start={SCHEDULES[schedule]}"]
    if arguments.data_file is not None:
        flags.append(f"--data_file={arguments.data_file}")
    return Run(
        Path(arguments.output_dir) / f"{model}-{schedule.split()[0]}-{seed}",
        "run_enwik8.py",
        [str(Path(__file__).with_name("recipes") / f"benchmark_{model}.yaml"), *flags],
        {"model": model, "schedule": schedule, "seed": seed},
    )


def records_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is recorded of a run."""
    return [
        {name: result[name] for name in ("method", "minutes", "scores", "averaged_scores")}
        for result in report["results"]
    ]


def rows(records: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The table: mean and standard deviation over the seeds."""
    for model, schedule in itertools.product(*(dict.fromkeys(r[k] for r in records) for k in ("model", "schedule"))):
        for method in METHODS:
            own = [r for r in records if (r["model"], r["schedule"], r["method"]) == (model, schedule, method)]
            if own:
                figures = [
                    spread([r[scores][split] for r in own])
                    for split in ("validation", "test")
                    for scores in ("scores", "averaged_scores")
                ]
                yield [model, schedule, method, *figures, str(len(own))]


def table(records: list[dict[str, Any]]) -> str:
    """The figures in Markdown, bits per character."""
    header = ["model", "schedule", "method", "validation", "validation, SWA", "test", "test, SWA", "seeds"]
    return markdown(header, 3, list(rows(records)))


def main() -> None:
    """Runs what is missing and writes figures and table."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    # Seed by seed, so that an interrupted benchmark has every method.
    settings = itertools.product(arguments.seeds, arguments.models, SCHEDULES)
    runs = [make_run(arguments, model, schedule, seed) for seed, model, schedule in settings]
    run_all(runs, arguments.workers)
    figures = collect(runs, records_of, ("torch", "transformers"))
    write_figures(__file__, figures, table(figures["runs"]), RESULTS_PAGE)


if __name__ == "__main__":
    main()
