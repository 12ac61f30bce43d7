"""
Late-phase weights where noise limits training: small minibatches, a constant rate. The paper's comparison there, the
controls that explain it, and what else costs the same.

    python examples/benchmarks/evidence/regime.py --task lstm
    python examples/benchmarks/evidence/regime.py --task gpt2
    python examples/benchmarks/evidence/regime.py --task enwik6 --data path/to/enwik6
    python examples/benchmarks/evidence/regime.py --task cifar --data path/to/cifar10
    python examples/benchmarks/evidence/regime.py --task noise
    python examples/benchmarks/evidence/regime.py --task steps

Every run is `run_enwik8.py` or `run_cifar.py` with a recipe `regime_*.yaml`, in a folder of its own. The first seed of
every method tries the same rates; the others run where that was best on validation, with and without the average over
time, and at one rate that all methods share; of these the mean over all seeds decides. The task noise is the LSTM with
minibatches of other sizes, the task steps with twice as many of them.

The figures go to `regime_TASK.json` beside this file. What stands there from the same releases is not run again, nor
what has finished in `output_dir`: an interrupted table goes on where it was. The tables made from all figures (see
`regime_report.py`) go into `RESULTS.md`, `docs/results.md` and the README.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from regime_report import Figures, figures_of, write_report
from regime_settings import AVERAGED, LONGER, LONGER_SEEDS, SWEEP, TASKS, Setting, setting
from runs import collect, command_line, environment, run_all


PLANS = [*TASKS, "noise", "steps"]


@dataclass
class RegimeArguments:
    """What is run, and where."""

    task: str = field(metadata={"help": f"One of {', '.join(PLANS)}."})
    data: str | None = field(default=None, metadata={"help": "Where the bytes of enwik6 or the images of cifar are."})
    output_dir: str = field(default="outputs/regime", metadata={"help": "Where the runs keep their models."})
    workers: int = field(default=2, metadata={"help": "Runs side by side, each on one thread."})

    def __post_init__(self) -> None:
        if self.task not in PLANS:
            raise ValueError(f"task must be one of {PLANS}, got {self.task!r}.")
        needs_data = self.task in TASKS and TASKS[self.task].data is not None
        if needs_data and self.data is None:
            raise ValueError(f"The data of the task {self.task} are not in the repository: add --data PATH.")
        if self.data is not None and not needs_data:
            raise ValueError(f"The data of the task {self.task} are in the repository: leave data out.")
        if self.data is not None and not Path(self.data).exists():
            raise ValueError(f"data names {self.data!r}, which does not exist.")


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
                if result.get(key)
            }
        for averaged, scores in found.items():
            for split, values in scores.items():
                record[split + averaged * AVERAGED] = values
    return [record]


def first_plan(name: str) -> list[Setting]:
    """The runs of a task that depend on no others of it."""
    if name == "noise":
        return SWEEP
    if name == "steps":
        return longer(Figures.of("lstm"))
    task = TASKS[name]
    tried = [
        setting(name, key, 0, rate)
        for key, method in task.methods.items()
        for rate in (task.rates if method.tuned else [task.rate])
    ]
    shared = [
        setting(name, key, seed)
        for seed in range(max(method.shared for method in task.methods.values()))
        for key, method in task.methods.items()
        if seed < method.shared
    ]
    return list(dict.fromkeys(tried + shared))


def longer(figures: Figures) -> list[Setting]:
    """The LSTM's runs with twice as many minibatches, each at all rates that its figures choose for one of them."""
    if not figures:
        raise ValueError("The task steps takes its rates from the figures of lstm, which has not run: run it first.")
    own = TASKS["lstm"]
    rates = {figures.chosen_rate(key, result, own.measure) for key in LONGER for result in own.methods[key].results}
    return [
        replace(setting("lstm", key, seed, rate), steps=2 * own.steps)
        for seed in range(LONGER_SEEDS)
        for key in LONGER
        for rate in sorted(rates)
    ]


def plan(name: str, figures: Figures) -> list[Setting]:
    """
    All runs of a task, once those of `first_plan` are among the figures.

    Seed by seed, so that an interrupted one has every method.
    """
    own = TASKS.get(name)
    tuned = [] if own is None else [
        setting(name, key, seed, rate)
        for seed in range(max(method.tuned for method in own.methods.values()))
        for key, method in own.methods.items()
        if seed < method.tuned
        for rate in sorted({figures.first_choice(key, result, own.measure) for result in method.results})
    ]  # fmt: skip
    return list(dict.fromkeys(first_plan(name) + tuned))


def recorded(name: str) -> dict[Setting, dict[str, Any]]:
    """What stands in the figures of a task already, if it was made with what is installed."""
    path = figures_of(name)
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["environment"] != made_with():
        return {}
    return {setting_of(name, run): run for run in record["runs"]}


def setting_of(name: str, run: dict[str, Any]) -> Setting:
    """That of a run which the figures of a task hold."""
    return Setting.of(name if name in TASKS else "lstm", run)


def made_with() -> dict[str, Any]:
    """The machine and the releases."""
    return environment() | {"torch": torch.__version__, "transformers": transformers.__version__}


def run_missing(
    settings: list[Setting], known: dict[Setting, dict[str, Any]], arguments: RegimeArguments
) -> dict[Setting, dict[str, Any]]:
    """Returns the figures of all settings; what is not known runs, unless it has finished in an earlier call."""
    missing = [own for own in settings if own not in known]
    runs = [own.run(Path(arguments.output_dir), arguments.data) for own in missing]
    run_all(runs, arguments.workers)
    found = collect(runs, records_of, ())["runs"]
    return known | dict(zip(missing, found, strict=True))


def main() -> None:
    """Runs what has not finished and writes figures and tables."""
    (arguments,) = HfArgumentParser(RegimeArguments).parse_args_into_dataclasses()
    name = arguments.task
    figures = run_missing(first_plan(name), recorded(name), arguments)
    settings = plan(name, Figures(list(figures.values())))
    figures = run_missing(settings, figures, arguments)
    record = {"command": command_line(), "environment": made_with(), "runs": [figures[own] for own in settings]}
    figures_of(name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_report()


if __name__ == "__main__":
    main()
