"""
Late-phase weights where noise limits training: small minibatches, a constant rate. The paper's comparison there, the
controls that explain it, and what else costs the same.

    python examples/benchmarks/evidence/regime.py --task lstm
    python examples/benchmarks/evidence/regime.py --task cifar --dataset path/to/cifar10
    python examples/benchmarks/evidence/regime.py --task noise

Every run is `run_enwik8.py` or `run_cifar.py` with a recipe `regime_*.yaml`, in a folder of its own; runs that have
finished are not repeated, so an interrupted table goes on where it was. All methods of a task have one rate. The task
noise is the LSTM with minibatches of other sizes and at another rate. The figures go to `regime_TASK.json` beside this
file, the tables made from all of these (see `regime_report.py`) into `RESULTS.md`, `docs/results.md` and the README.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from regime_report import figures_of, write_report
from regime_settings import SWEEP, TASKS, Setting, setting
from runs import collect, run_all


LIBRARIES = ("torch", "transformers")
PLANS = [*TASKS, "noise"]


@dataclass
class RegimeArguments:
    """What is run, and where."""

    task: str = field(metadata={"help": f"One of {', '.join(PLANS)}."})
    dataset: str | None = field(default=None, metadata={"help": "The images of the task cifar, as in run_cifar.py."})
    output_dir: str = field(default="outputs/regime", metadata={"help": "Where the runs keep their models."})
    workers: int = field(default=2, metadata={"help": "Runs side by side, each on one thread."})

    def __post_init__(self) -> None:
        if self.task not in PLANS:
            raise ValueError(f"task must be one of {PLANS}, got {self.task!r}.")
        if (self.task == "cifar") != (self.dataset is not None):
            raise ValueError("dataset names the images of the task cifar: give it there, and there only.")


def records_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run has brought: measures by split, of the final weights and of their average over time."""
    record: dict[str, Any] = {"minutes": round(report["results"][0]["minutes"], 2)}
    for result in report["results"]:
        if "variant" in result:  # an image classifier: a result for each kind of prediction
            if "ensemble" in result["variant"]:
                continue
            averaged = bool(result["variant"])
            scores = {
                split: {name: own[name] for name in ("accuracy", "nll")} for split, own in result["scores"].items()
            }
            found = {averaged: scores}
        else:
            found = {
                averaged: {split: {"bpc": value} for split, value in result[key].items()}
                for averaged, key in ((False, "scores"), (True, "averaged_scores"))
            }
        for averaged, scores in found.items():
            for split, values in scores.items():
                record[split + averaged * ", SWA"] = values
    return [record]


def plan(name: str) -> list[Setting]:
    """The runs of a task, seed by seed, so that an interrupted one has every method."""
    if name == "noise":
        return SWEEP
    methods = TASKS[name].methods
    last = max(method.seeds for method in methods.values())
    return [setting(name, key, seed) for seed in range(last) for key, own in methods.items() if seed < own.seeds]


def main() -> None:
    """Runs what has not finished and writes figures and tables."""
    (arguments,) = HfArgumentParser(RegimeArguments).parse_args_into_dataclasses()
    name, folder = arguments.task, Path(arguments.output_dir)
    runs = [own.run(folder, arguments.dataset) for own in plan(name)]
    run_all(runs, arguments.workers)
    record = collect(runs, records_of, LIBRARIES)
    figures_of(name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_report()


if __name__ == "__main__":
    main()
