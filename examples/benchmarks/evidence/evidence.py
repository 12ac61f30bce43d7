"""
The evidence: what replicating weights adds to what the same minibatches buy without it.

    python examples/benchmarks/evidence/evidence.py --tables finetune_lstm_enwik6_60kb finetune_gpt2_enwik6_60kb

A table (see `evidence_tables.py`) compares methods over the same minibatches. For each of its rows the learning rate
is chosen on the validation split: the first seed tries a grid, all seeds run at its two best rates (at the second only
if it is near), the mean decides, and the grid is extended until that best is neither the lowest nor the highest. The
test split is read only then: what is recorded of the other rates has no test figures. Every run is a script of
`examples/` in a folder of its own; runs that have finished are not repeated, so an interrupted table goes on where it
was. The figures of a table go to `evidence/TABLE.json`; `RESULTS.md`, the README's summary and that of
`docs/results.md` are made anew from all
of those. A table that has got new rows is completed by `--only_missing=true`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

import regime_report
from comparison import RECIPES, Row, Table, text_file
from evidence_tables import TABLES
from runs import (
    README,
    RESULTS,
    RESULTS_PAGE,
    Run,
    difference,
    environment,
    markdown,
    put_into_page,
    run_all,
    spread,
    with_table,
)


FIGURES = Path(__file__).with_name("figures")
SPLITS = ("validation", "test")
NEAR = 0.05  # bits per byte: nearly twice the most by which one seed was seen to misjudge a rate (LOG.md, Django)
INTRODUCTION = FIGURES / "introduction.md"


@dataclass
class EvidenceArguments:
    """What is run, and where."""

    tables: list[str] = field(metadata={"help": f"Any of {', '.join(TABLES)}."})
    output_dir: str = field(default="outputs/evidence", metadata={"help": "Where the runs keep their models."})
    workers: int = field(default=2, metadata={"help": "Runs side by side, each on one thread."})
    only_missing: bool = field(
        default=False, metadata={"help": "Run the rows that a table's recorded figures lack, and keep the others."}
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.tables if name not in TABLES]
        if unknown:
            raise ValueError(f"tables: {unknown} are none of {list(TABLES)}.")
        on_gpu = [name for name in self.tables if TABLES[name].device == "cuda"]
        if on_gpu and not torch.cuda.is_available():
            raise ValueError(f"tables: {on_gpu} run on a GPU, but torch sees none. Leave them out.")


def make_run(table: Table, row: Row, rate: float, seed: int, folder: Path) -> Run:
    """One run of one method; rows that differ in what is read out of it share it."""
    name = f"{row.run}-{rate:g}-{seed}".replace(" ", "_")
    flags = [*table.flags(folder), *table.runs[row.run], f"--learning_rate={rate}", f"--seed={seed}"]
    recipe = [str(RECIPES / table.recipe)]
    labels = {"run": row.run, "rate": rate, "seed": seed}
    return Run(folder / table.name / name, table.script, [*recipe, *flags], labels, table.device)


def read(run: Run, row: Row) -> dict[str, float]:
    """The figures of a row, by split."""
    report = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    result = report["results"][-1]  # scores before fine-tuning come first
    return {split: result[row.figures][split] for split in SPLITS}


def two_best(figures: dict[float, list[float]]) -> list[float]:
    """The rates at which the first seed did best; the second only if other seeds might prefer it."""
    best, *others = sorted(figures, key=lambda rate: figures[rate][0])
    return [best, *(rate for rate in others[:1] if figures[rate][0] - figures[best][0] <= NEAR)]


def best_rate(figures: dict[float, list[float]], num_seeds: int) -> float:
    """The rate of the lowest mean, of those that all seeds ran at."""
    means = {rate: statistics.mean(own) for rate, own in figures.items() if len(own) == num_seeds}
    return min(means, key=lambda rate: means[rate])


def beyond(rates: Sequence[float], best: float) -> list[float]:
    """What to try next: half the lowest rate or twice the highest, if that is the best so far."""
    if len(rates) == 1:
        return []  # there is nothing to choose
    return [best / 2] * (best == min(rates)) + [best * 2] * (best == max(rates))


def tune(table: Table, folder: Path, workers: int) -> dict[str, dict[float, list[float]]]:
    """
    Runs the first seed at the table's rates, all seeds at its two best, and goes beyond the table's rates until no
    row's best is at an end.

    Returns:
        `dict[str, dict[float, list[float]]]`: By row and rate, the validation figures by seed.
    """
    rows = {row.name: row for row in table.rows}
    tried: dict[str, dict[float, list[float]]] = {name: {} for name in rows}

    def run_seeds(rates: dict[str, list[float]], seeds: Sequence[int]) -> None:
        runs = {
            (name, rate): [make_run(table, rows[name], rate, seed, folder) for seed in seeds]
            for name, own in rates.items()
            for rate in own
        }
        run_all(_distinct(run for own in runs.values() for run in own), workers)
        for (name, rate), own in runs.items():
            tried[name][rate] = [read(run, rows[name])["validation"] for run in own]

    waiting = {name: list(table.rates) for name in rows}
    while any(waiting.values()):
        run_seeds(waiting, table.seeds[:1])
        # One seed is too few to tell the best rate from the second.
        run_seeds({name: two_best(figures) for name, figures in tried.items()}, table.seeds)
        waiting = {
            name: beyond(list(figures), best_rate(figures, len(table.seeds))) for name, figures in tried.items()
        }
    return tried


def fill(table: Table, folder: Path, workers: int) -> dict[str, Any]:
    """
    Runs what has not finished of a table and returns its figures.

    Returns:
        `dict[str, Any]`: By row: the validation figures by rate and seed, the rate chosen, and both splits' figures by
        seed.
    """
    tried = tune(table, folder, workers)
    filled = {}
    for row in table.rows:
        figures = tried[row.name]
        rate = best_rate(figures, len(table.seeds))
        runs = [make_run(table, row, rate, seed, folder) for seed in table.seeds]
        filled[row.name] = {
            "validation by rate": {f"{rate:g}": own for rate, own in sorted(figures.items())},
            "rate": rate,
            "seeds": list(table.seeds),
            "validation": figures[rate],
            "test": [read(run, row)["test"] for run in runs],
        }
    return filled


def deep_ensemble(table: Table, rows: dict[str, Any], folder: Path) -> dict[str, float]:
    """The figures of a row's models of all seeds together, by split: as many times the training and the inference."""
    (row,) = (row for row in table.rows if row.name == table.deep_ensemble)
    rate = rows[row.name]["rate"]
    runs = [make_run(table, row, rate, seed, folder) for seed in table.seeds]
    recipe = yaml.safe_load((RECIPES / table.recipe).read_text(encoding="utf-8"))
    flags = [f"--{name}={recipe[name]}" for name in ("window", "stride") if name in recipe]
    limit = recipe.get("max_eval_tokens") or recipe["max_eval_bytes"]  # a token is a byte
    flags.append(f"--max_eval_tokens={limit}")
    flags += [f"--data_file={text_file(table.text, folder)}", "--models", *(str(run.folder / "base") for run in runs)]
    together = Run(folder / table.name / f"deep_ensemble-{rate:g}", "score_ensemble.py", flags, {})
    run_all([together], 1)
    return read(together, Row("deep ensemble", "base"))


def _distinct(runs: Any) -> list[Run]:
    return list({run.folder: run for run in runs}.values())


def best_of(table: Table, rows: dict[str, Any], late_phase: bool, split: str) -> str:
    """The best single model on a split, of those that replicate weights or of those that do not."""
    names = [row.name for row in table.rows if row.is_late_phase == late_phase and row.is_one_model]
    return min(names, key=lambda name: statistics.mean(rows[name][split]))


def section(table: Table, record: dict[str, Any]) -> str:
    """A table in Markdown, with paired differences from its best late-phase row (on validation) or its first."""
    rows = record["rows"]
    best = table.rows[0].name if table.is_ablation else best_of(table, rows, late_phase=True, split="validation")
    lines = []
    for row in table.rows:
        own = rows[row.name]
        cells = [row.name, f"{own['rate']:g}", spread(own["validation"]), spread(own["test"])]
        if row.name == best:
            cells.append("–")
        else:
            mean, width = difference(own["test"], rows[best]["test"])
            cells.append(f"{mean:+.3f} ± {width:.3f}")
        lines.append(cells)
    header = ["method", "rate", "validation", "test", f"test, less that of {best}"]
    seeds = len(next(iter(rows.values()))["seeds"])
    text = f"{table.description} {seeds} seeds; bits per byte, lower is better; mean ± standard deviation, and in the "
    text += "last column the paired difference with its 95 % interval: positive means that "
    text += f"{'the first row' if table.is_ablation else 'late-phase'} is better.\n"
    parts = [f"## {table.title}\n", text, markdown(header, 1, lines)]
    if together := record.get("deep ensemble"):
        parts.append(
            f"Deep ensemble of the {seeds} models of “{table.deep_ensemble}” (mean of their predictions, at {seeds} "
            f"times the cost): {together['validation']:.3f} validation, {together['test']:.3f} test.\n"
        )
    return "\n".join([*parts, f"    {record['command']}  # {num_runs(table, rows)} runs\n"])


def num_runs(table: Table, rows: dict[str, Any]) -> int:
    """How many runs a table is made from; rows share some."""
    return len(
        {
            (row.run, rate, seed)
            for row in table.rows
            for rate, own in rows[row.name]["validation by rate"].items()
            for seed in range(len(own))
        }
    )


def recorded() -> dict[str, dict[str, Any]]:
    """The figures of all tables that there are, but for those that have got rows since which have not run."""
    paths = {name: FIGURES / f"{name}.json" for name in TABLES}
    records = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    for name, record in list(records.items()):
        if missing := {row.name for row in TABLES[name].rows} - set(record["rows"]):
            print(f"{name} is left out of the report until these rows have run: {sorted(missing)}", file=sys.stderr)
            del records[name]
    return records


def report() -> str:
    """`RESULTS.md`: it begins with the tables of `regime.py`."""
    introduction = INTRODUCTION.read_text(encoding="utf-8")
    for mark, (table, pages) in regime_report.TABLES.items():
        if RESULTS in pages:
            introduction = with_table(introduction, mark, table())
    sections = [section(TABLES[name], record) for name, record in recorded().items()]
    return "\n".join([introduction, *sections])


def compared() -> list[tuple[str, str, str, dict[str, Any]]]:
    """Of each table: its title, the best control on test, the best late-phase row on validation, all rows."""
    found = []
    for name, record in recorded().items():
        table, rows = TABLES[name], record["rows"]
        if not table.is_ablation:
            control = best_of(table, rows, late_phase=False, split="test")
            late = best_of(table, rows, late_phase=True, split="validation")
            found.append((table.title, control, late, rows))
    return found


def summary() -> str:
    """The table of `docs/results.md`: what was compared, its spread and the differences' intervals."""
    lines = []
    for title, control, late, rows in compared():
        mean, width = difference(rows[control]["test"], rows[late]["test"])
        lines.append(
            [title, control, spread(rows[control]["test"]), late, spread(rows[late]["test"])]
            + [f"{mean:+.3f} ± {width:.3f}"]
        )
    return markdown(["", "strongest control", "test", "late-phase", "test", "control less late-phase"], 1, lines)


def headline() -> str:
    """The README's table: the same in a few figures."""
    lines = []
    for title, control, late, rows in compared():
        means = [f"{statistics.mean(rows[row]['test']):.3f}" for row in (control, late)]
        mean, width = difference(rows[control]["test"], rows[late]["test"])
        lines.append([title, *means, f"{mean:+.3f} ± {width:.3f}"])
    return markdown(["bits per byte, on test", "strongest control", "late-phase", "late-phase ahead by"], 1, lines)


def record_of(table: Table, folder: Path, workers: int) -> dict[str, Any]:
    """All that is recorded of a table."""
    rows = fill(table, folder, workers)
    return {
        "command": f"python examples/benchmarks/evidence/evidence.py --tables {table.name}",
        "environment": environment(table.device) | versions(),
        "rows": rows,
        "deep ensemble": deep_ensemble(table, rows, folder) if table.deep_ensemble else None,
    }


def complete(table: Table, record: dict[str, Any], folder: Path, workers: int) -> dict[str, Any]:
    """
    A record with the rows that it lacks, in the table's order, run now.

    Raises:
        `ValueError`: If it was made with other versions, or on another kind of machine.
    """
    now = environment(table.device) | versions()
    if record["environment"] != now:
        raise ValueError(f"{table.name} was recorded with {record['environment']}, this is {now}: run all its rows.")
    missing = [row for row in table.rows if row.name not in record["rows"]]
    rows = record["rows"] | fill(dataclasses.replace(table, rows=missing), folder, workers)
    return record | {"rows": {row.name: rows[row.name] for row in table.rows}}


def main() -> None:
    """Runs what has not finished and writes figures and report."""
    (arguments,) = HfArgumentParser(EvidenceArguments).parse_args_into_dataclasses()
    for name in arguments.tables:
        table, folder = TABLES[name], Path(arguments.output_dir)
        table.prepare(folder)
        path = FIGURES / f"{name}.json"
        if arguments.only_missing and path.exists():
            record = complete(table, json.loads(path.read_text(encoding="utf-8")), folder, arguments.workers)
        else:
            record = record_of(table, folder, arguments.workers)
        FIGURES.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        RESULTS.write_text(report(), encoding="utf-8")
        put_into_page(RESULTS_PAGE, "evidence", summary())
        put_into_page(README, "evidence", headline())
        print(section(table, record))


def versions() -> dict[str, str]:
    """Those that figures depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
