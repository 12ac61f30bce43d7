"""
The default moving average against the weights that it averages, at every evaluation of short and longer runs.

    python examples/benchmarks/evidence/averages.py --dataset path/to/cifar10

Three models, each trained for 200, 500 and 2,000 steps: the demo's LSTM, a small gpt2, a small wide residual network.
Every run is one of `run_enwik8.py` or `run_cifar.py` in a folder of its own; runs that have finished are not repeated,
so an interrupted benchmark goes on where it was. The figures go to `averages.json` beside this file, the table made
from them to `averages.md` and into `docs/averaging.md`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from runs import EXAMPLES, Run, collect, markdown, put_into_page, run_all


RESULTS = Path(__file__).with_suffix(".json")
DOCS = EXAMPLES.parent / "docs" / "averaging.md"
RECIPES = Path(__file__).with_name("recipes")
DEMO = EXAMPLES / "language_modeling" / "recipes" / "enwik8_demo.yaml"
# What the recipes compare, which is not compared here.
LEFT_OUT = {"method", "swa_start", "output_dir", "max_steps", "eval_steps", "logging_steps"}
EVALUATIONS = 10
EMA = ["--ema_memory=0.1"]  # LatePhaseConfig.preset("ema")


@dataclass
class Model:
    """
    A model and how it is trained.

    Attributes:
        title (`str`): Its name in the table.
        script (`str`), recipe (`Path`): What trains it.
        metric (`str`): What is watched, as the script's curve names it.
        scale (`float`): Makes it the unit of the table.
        unit (`str`): That unit.
        flags (`list[str]`): What differs from the recipe.
    """

    title: str
    script: str
    recipe: Path
    metric: str
    scale: float
    unit: str
    flags: list[str]


TEXT = ["--curve_bytes=20000", "--max_eval_bytes=20000", "--sample_bytes=10"]
MODELS = {
    "lstm": Model(
        *("LSTM, 128 units", "run_enwik8.py", DEMO, "bpc", 1, "bits"),
        [*TEXT, "--per_device_train_batch_size=16"],
    ),
    "gpt2": Model("gpt2, 2 layers", "run_enwik8.py", RECIPES / "benchmark_gpt2.yaml", "bpc", 1, "bits", TEXT),
    "wide_resnet": Model(
        "WideResNet 10-1", "run_cifar.py", RECIPES / "benchmark_cifar.yaml", "error", 100, "points",
        ["--curve_images=2000", "--model_config", json.dumps({"depth": 10, "widen_factor": 1})],
    ),
}  # fmt: skip


@dataclass
class BenchmarkArguments:
    """What is run, and where."""

    dataset: str | None = field(
        default=None, metadata={"help": "The images, as in run_cifar.py. Default: scikit-learn's digits."}
    )
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": f"Any of {', '.join(MODELS)}."})
    steps: list[int] = field(default_factory=lambda: [200, 500, 2000], metadata={"help": "Lengths of the runs."})
    seeds: list[int] = field(default_factory=lambda: [0])
    output_dir: str = field(default="outputs/averages", metadata={"help": "Where the runs keep their models."})
    workers: int = field(default=2, metadata={"help": "Runs side by side, each on one thread."})

    def __post_init__(self) -> None:
        if min(self.steps) < EVALUATIONS:
            raise ValueError(f"steps must be at least {EVALUATIONS}, of which each run has as many evaluations.")


def make_run(arguments: BenchmarkArguments, name: str, steps: int, seed: int) -> Run:
    """One run with the default moving average."""
    model = MODELS[name]
    recipe = yaml.safe_load(model.recipe.read_text(encoding="utf-8"))
    folder = Path(arguments.output_dir) / f"{name}-{steps}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    # No flag can take back what a recipe says.
    trimmed = folder / "recipe.json"
    trimmed.write_text(json.dumps({key: value for key, value in recipe.items() if key not in LEFT_OUT}, indent=1))
    every = steps // EVALUATIONS
    flags = [
        str(trimmed),
        "--method=base",
        f"--max_steps={steps}",
        f"--eval_steps={every}",
        f"--logging_steps={every}",
    ]
    flags += [f"--seed={seed}", *EMA, *model.flags]
    if model.script == "run_cifar.py" and arguments.dataset is not None:
        flags.append(f"--dataset={arguments.dataset}")
    return Run(folder, model.script, flags, {"model": name, "steps": steps, "seed": seed})


def records_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is recorded of a run: its curve."""
    (curve,) = [result["curve"] for result in report["results"] if result["curve"]]
    return [{"curve": curve}]


def rows_of(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each model and length: the last evaluation, and the widest lag of the average over all."""
    rows = []
    for record in records:
        model = MODELS[record["model"]]
        # Before the average begins it is the weights.
        name = f"{model.metric}_averaged"
        pairs = [(p["step"], p[model.metric], p.get(name, p[model.metric])) for p in record["curve"]]
        points = [(step, raw * model.scale, average * model.scale) for step, raw, average in pairs]
        step, lag = max(((step, average - raw) for step, raw, average in points), key=lambda pair: pair[1])
        digits = 3 if model.scale == 1 else 2
        _, raw, average = points[-1]
        rows.append(
            [f"{model.title} ({model.unit})", f"{record['steps']:,}"]
            + [f"{value:.{digits}f}" for value in (raw, average)]
            + [f"{lag:+.{digits}f} (step {step:,})"]
        )
    return rows


def table(records: Sequence[dict[str, Any]]) -> str:
    """The table."""
    header = ["model", "steps", "raw, at the end", "average, at the end", "average worse by, at most"]
    return markdown(header, 1, rows_of(records))


def main(argv: list[str] | None = None) -> None:
    """Runs what has not finished yet and writes the table."""
    (arguments,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)
    # The long ones first, so that both workers end together.
    runs = [
        make_run(arguments, name, steps, seed)
        for steps in sorted(arguments.steps, reverse=True)
        for name in arguments.models
        for seed in arguments.seeds
    ]
    run_all(runs, arguments.workers)
    figures = collect(runs, records_of, ["torch", "transformers"])
    order = list(MODELS)
    figures["runs"].sort(key=lambda record: (order.index(record["model"]), record["steps"], record["seed"]))
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = table(figures["runs"])
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
    put_into_page(DOCS, "averages", text)
    print(text)


if __name__ == "__main__":
    main()
