"""What the benchmarks share: runs of a script, their spread, and tables in the documentation."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from tqdm.auto import tqdm


EXAMPLES = Path(__file__).resolve().parents[1]
README = EXAMPLES.parent / "README.md"
RESULTS = EXAMPLES / "benchmarks" / "RESULTS.md"
# Pages of the documentation that hold tables.
RESULTS_PAGE = EXAMPLES.parent / "docs" / "results.md"
PERFORMANCE_PAGE = EXAMPLES.parent / "docs" / "performance.md"


@dataclass
class Run:
    """
    One run of a script.

    Attributes:
        folder (`Path`): Its output folder; `log.txt` in it is what the script printed.
        script (`str`): The name of a script in `language_modeling` or `vision`, which has a `main(arguments)`.
        arguments (`list[str]`): Its arguments, without `--output_dir`.
        labels (`dict[str, Any]`): What tells the run from the others.
        device (`str`): `"cpu"`, or `"cuda"` and bf16.
    """

    folder: Path
    script: str
    arguments: list[str]
    labels: dict[str, Any]
    device: str = "cpu"

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end, now or in an earlier call."""
        return (self.folder / "finished").exists()

    def start(self) -> None:
        """Runs the script in this process, unless it has finished before."""
        if self.is_finished:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        common = [f"--output_dir={self.folder}", "--disable_tqdm=true", "--report_to=none"]
        common.append("--use_cpu=true" if self.device == "cpu" else "--bf16=true")
        with open(self.folder / "log.txt", "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            importlib.import_module(Path(self.script).stem).main([*self.arguments, *common])
        (self.folder / "finished").touch()


def run_all(runs: Sequence[Run], workers: int) -> None:
    """
    Runs what has not finished yet, with a bar: some side by side, each on one thread.

    A process takes one run after another, since starting it takes as long as a short run.
    """
    waiting = [run for run in runs if not run.is_finished]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        for _ in tqdm(pool.map(Run.start, waiting), total=len(waiting), desc="Runs"):
            pass


def _one_thread() -> None:
    # Not by OMP_NUM_THREADS: torch has read it by now if the benchmark's own file imports torch.
    torch.set_num_threads(1)
    sys.path.extend(str(EXAMPLES / name) for name in ("language_modeling", "vision"))


def collect(
    runs: Sequence[Run], records_of: Callable[[dict[str, Any]], list[dict[str, Any]]], libraries: Sequence[str]
) -> dict[str, Any]:
    """
    The figures of all finished runs.

    Args:
        runs (`Sequence[Run]`):
            The runs.
        records_of (`Callable[[dict[str, Any]], list[dict[str, Any]]]`):
            Picks what is recorded out of a run's `results.json`; the run's labels are added.
        libraries (`Sequence[str]`):
            Whose versions, from the settings of the last run, are recorded.
    """
    records, versions = [], {}
    for run in runs:
        if not run.is_finished:
            continue
        report = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
        records += [run.labels | record for record in records_of(report)]
        versions = {name: report["settings"][name] for name in libraries}
    return {"command": command_line(), "environment": environment() | versions, "runs": records}


def command_line() -> str:
    """What was called, without where this machine keeps its files."""
    return " ".join(["python", *(re.sub(r"(^|=)/.*/", r"\1path/to/", word) for word in sys.argv)])


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine, as far as it can be told."""
    machine = {"machine": platform.machine(), "python": platform.python_version(), "threads per run": 1}
    if device == "cpu":
        return machine
    return machine | {"device": torch.cuda.get_device_name()}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation; the value alone, if there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def difference(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences over the seeds, and half the width of its 95 % interval (Student's t)."""
    pairs = [a - b for a, b in zip(own, other, strict=True)]
    width = student.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return statistics.mean(pairs), float(width)


def markdown(header: list[str], left: int, rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first `left` are flushed right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows)) + "\n"


def with_table(page: str, mark: str, text: str) -> str:
    """A page with a table between its marks."""
    begin, end = f"<!-- {mark} -->\n", "<!-- end -->"
    before, found, rest = page.partition(begin)
    if not found:
        raise ValueError(f"The page has no line {begin.strip()!r}, after which the table should go.")
    return before + begin + text + end + rest.partition(end)[2]


def put_into_page(page: Path, mark: str, text: str) -> None:
    """Writes a table between its marks in a page."""
    page.write_text(with_table(page.read_text(encoding="utf-8"), mark, text), encoding="utf-8")


def write_figures(script: str, figures: dict[str, Any], text: str, page: Path) -> None:
    """Writes a benchmark's figures and table beside its script, and the table into a page."""
    path = Path(script)
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    put_into_page(page, path.stem, text)
    print(text)
