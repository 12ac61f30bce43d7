"""
Late-phase language models against their controls: two architectures, two schedules, several seeds.

    python examples/benchmarks/language_models.py --data_file enwik6

Every run is `examples/run_enwik8.py` with a recipe, in a process and a folder of its own; runs that have finished are
not repeated, so an interrupted benchmark goes on where it was. The figures of all runs are written to
`examples/benchmarks/language_models.json`; the table made from them goes to `language_models.md` beside it and into
the README.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import HfArgumentParser


EXAMPLES = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("language_models.json")
README = EXAMPLES.parent / "README.md"
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


def run(arguments: BenchmarkArguments, model: str, schedule: str, seed: int) -> None:
    """One run, unless it has finished before."""
    folder = Path(arguments.output_dir) / f"{model}-{schedule.split()[0]}-{seed}"
    if (folder / "finished").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(EXAMPLES / "run_enwik8.py"), str(EXAMPLES / "recipes" / f"benchmark_{model}.yaml"),
        f"--output_dir={folder}", f"--seed={seed}", f"--decay_after_start={SCHEDULES[schedule]}",
        "--disable_tqdm=true", "--report_to=none", "--use_cpu=true",
    ]  # fmt: skip
    if arguments.data_file is not None:
        command.append(f"--data_file={arguments.data_file}")
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
    (folder / "finished").touch()


def collect(arguments: BenchmarkArguments, runs: list[tuple[str, str, int]]) -> dict[str, Any]:
    """The figures of all finished runs."""
    records = []
    for model, schedule, seed in runs:
        folder = Path(arguments.output_dir) / f"{model}-{schedule.split()[0]}-{seed}"
        if not (folder / "finished").exists():
            continue
        report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        for result in report["results"]:
            names = ("method", "minutes", "scores", "averaged_scores")
            records.append({"model": model, "schedule": schedule, "seed": seed} | {k: result[k] for k in names})
        versions = {k: report["settings"][k] for k in ("torch", "transformers")}
    machine = {"machine": platform.machine(), "python": platform.python_version(), "threads per run": 1}
    return {"command": " ".join(["python", *sys.argv]), "environment": machine | versions, "runs": records}


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


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def table(records: list[dict[str, Any]]) -> str:
    """The figures in Markdown, bits per character."""
    header = ["model", "schedule", "method", "validation", "validation, SWA", "test", "test, SWA", "seeds"]
    lines = [header, ["---"] * 3 + ["---:"] * 5, *rows(records)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def put_into_readme(readme: str, text: str) -> str:
    """The README with the table between its marks."""
    begin, end = "<!-- language_models -->\n", "<!-- end -->"
    before, _, rest = readme.partition(begin)
    return before + begin + text + end + rest.partition(end)[2]


def main() -> None:
    """Runs what is missing and writes figures and table."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    runs = list(itertools.product(arguments.models, SCHEDULES, arguments.seeds))
    # Seed by seed, so that an interrupted benchmark has every method.
    runs.sort(key=lambda r: r[2])
    with ThreadPoolExecutor(arguments.workers) as pool:
        for _ in tqdm(pool.map(lambda r: run(arguments, *r), runs), total=len(runs), desc="Runs"):
            pass
    figures = collect(arguments, runs)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = table(figures["runs"])
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
    README.write_text(put_into_readme(README.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
