"""
Wide residual networks on CIFAR-10 as the paper trains them, on one GPU: base, late-phase training and accumulation,
each with and without SWA, as many seeds as fit.

    python examples/benchmarks/evidence/paper_cifar.py --dataset path/to/cifar10
    python examples/benchmarks/evidence/paper_cifar.py --dataset path/to/cifar10 --model 16-4 --seeds 0 1 2

The recipe is `examples/vision/recipes/cifar10_swa.yaml` (`--recipe cifar10_sgd` is the other schedule of the paper):
200 epochs, K = 10, minibatches of 128 images, Nesterov momentum. Every run is `run_cifar.py` with one method, in bf16
and channels_last, in a folder of its own. It keeps a checkpoint every twentieth of training: called again, finished
runs are not repeated and a run that was cut off goes on from its last checkpoint, so that short leases add up. No run
begins once `minutes` are over. All data is local. The figures go to `paper_cifar.json` beside this file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from runs import EXAMPLES, Run, environment, markdown, spread


RESULTS = Path(__file__).with_suffix(".json")
METHODS = ("base", "late_phase", "accumulation")
MEASURES = ("accuracy", "nll", "calibration_error")


@dataclass
class PaperArguments:
    """What is run, and for how long."""

    dataset: str = field(metadata={"help": "A local folder of CIFAR-10, as in run_cifar.py."})
    model: str = field(default="28-10", metadata={"help": "Depth and widening factor: 28-10, 16-4, ..."})
    recipe: str = field(default="cifar10_swa", metadata={"help": "cifar10_swa or cifar10_sgd, the paper's two."})
    seeds: list[int] = field(default_factory=lambda: [0])
    minutes: float = field(default=25, metadata={"help": "No run begins after so long."})
    max_steps: int | None = field(default=None, metadata={"help": "Instead of 200 epochs, to try it."})
    loaders: int = field(default=8, metadata={"help": "Processes that augment images."})
    device: str = field(default="cuda", metadata={"help": "cuda, or cpu to try it."})
    output_dir: str = field(default="outputs/paper_cifar", metadata={"help": "Where the runs keep their models."})
    results: str = field(default=str(RESULTS), metadata={"help": "Where the figures go."})

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no GPU. Name device=cpu and few max_steps to try it.")
        if self.recipe not in ("cifar10_swa", "cifar10_sgd"):
            raise ValueError(f"recipe must be cifar10_swa or cifar10_sgd, got {self.recipe!r}.")
        if not Path(self.dataset).is_dir():
            raise ValueError(f"dataset={self.dataset!r} is no folder: the images must be here, none are fetched.")


def make_run(arguments: PaperArguments, method: str, seed: int) -> Run:
    """One method from one seed."""
    depth, widen_factor = map(int, arguments.model.split("-"))
    flags = [
        str(EXAMPLES / "vision" / "recipes" / f"{arguments.recipe}.yaml"),
        f"--dataset={arguments.dataset}",
        f"--method={method}",
        f"--seed={seed}",
        f"--model_config={json.dumps({'depth': depth, 'widen_factor': widen_factor})}",
        "--ood_dataset=digits",  # the recipe's are on the Hub
        "--resume=true",
        "--save_strategy=steps",
        "--save_steps=0.05",
        f"--dataloader_num_workers={arguments.loaders}",
        f"--dataloader_persistent_workers={str(arguments.loaders > 0).lower()}",
    ]
    if arguments.max_steps is not None:
        flags.append(f"--max_steps={arguments.max_steps}")
    name = f"{arguments.model}-{arguments.recipe}-{method}-{seed}"
    labels = {"model": arguments.model, "recipe": arguments.recipe, "seed": seed}
    return Run(Path(arguments.output_dir) / name, "run_cifar.py", flags, labels, arguments.device)


def records_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is recorded of a run: its test figures, of each way to predict."""
    return [
        {
            "method": ", ".join(filter(None, (result["method"], result["variant"]))),
            "minutes": round(result["minutes"], 2),
            **{name: result["scores"]["test"][name] for name in MEASURES},
        }
        for result in report["results"]
    ]


def run_until(runs: Sequence[Run], minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Runs what has not finished, one after another, as long as there is time to begin."""
    started = clock()
    for run in runs:
        if not run.is_finished and clock() - started >= 60 * minutes:
            print(f"{minutes:g} minutes are over: call this again for {run.folder.name} and what follows.", flush=True)
            return
        run.start()


def collect_finished(runs: Sequence[Run], path: Path, device: str) -> dict[str, Any]:
    """The figures of what has finished, with those that were recorded before of other runs."""
    before = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    records = {_key(record): record for record in before}
    versions = {}
    for run in runs:
        if run.is_finished:
            report = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
            records |= {_key(record): record for record in (run.labels | own for own in records_of(report))}
            versions = {name: report["settings"][name] for name in ("torch", "torchvision", "transformers")}
    command = "python examples/benchmarks/evidence/paper_cifar.py --dataset path/to/cifar10"
    return {"command": command, "environment": environment(device) | versions, "runs": list(records.values())}


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("model", "recipe", "method", "seed"))


def table(records: Sequence[dict[str, Any]]) -> str:
    """The figures in Markdown; accuracy in per cent."""
    lines = []
    for model, recipe, method in dict.fromkeys(_key(record)[:3] for record in records):
        own = [record for record in records if _key(record)[:3] == (model, recipe, method)]
        accuracy = spread([100 * record["accuracy"] for record in own], digits=2)
        others = [spread([record[name] for record in own]) for name in MEASURES[1:]]
        lines.append([model, recipe, method, accuracy, *others, str(len(own))])
    return markdown(["model", "recipe", "method", "accuracy", "NLL", "ECE", "seeds"], 3, lines)


def main() -> None:
    """Runs what there is time for and writes the figures."""
    (arguments,) = HfArgumentParser(PaperArguments).parse_args_into_dataclasses()
    sys.path.append(str(EXAMPLES / "vision"))
    # Seed by seed, so that an interrupted table has every method.
    runs = [make_run(arguments, method, seed) for seed in arguments.seeds for method in METHODS]
    run_until(runs, arguments.minutes)
    path = Path(arguments.results)
    figures = collect_finished(runs, path, arguments.device)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(table(figures["runs"]))


if __name__ == "__main__":
    main()
