"""
Late-phase weights on every architecture: attach, train, average, save, reload with the stock class.

    python examples/benchmarks/coverage/coverage.py

builds a tiny random model of each causal LM class that transformers maps, each masked LM, seq2seq model, image and
audio classifier, and of timm's families; attaches rank-1 factors, norms, both and the head; trains two cycles through
`LatePhaseTrainer`; saves the average; and reloads it in an interpreter without `hf_latephase`, where keys, logits (to
1e-5) and generated tokens must be the trained model's. Without late-phase weights the same is done first: what the
stock library cannot do is listed as that. The rows go to `coverage.json`, the table made from them to `coverage.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import timm
import torch
import transformers
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from round_trip import FAMILIES, MARK, SECONDS, Row
from runs import markdown
from tiny_models import KINDS, TIMM


HERE = Path(__file__).resolve().parent
RESULTS = HERE / "coverage.md"
BLOCK = 24  # architectures to an interpreter, whose start takes as long as several of them
TITLES = {
    "causal-lm": "Causal language models",
    "masked-lm": "Masked language models",
    "seq2seq": "Sequence to sequence",
    "image": "Image classifiers",
    "audio": "Audio classifiers",
    "timm": "timm's image classifiers",
}


def architectures(kinds: Iterable[str] = tuple(TITLES)) -> list[str]:
    """Returns all names `kind/architecture` of some kinds."""
    found: list[str] = []
    for kind in kinds:
        names: Iterable[str] = timm.list_models(TIMM) if kind == "timm" else KINDS[kind]
        found += [f"{kind}/{name}" for name in names]
    return found


def sweep(names: Sequence[str], workers: int, folder: Path) -> list[Row]:
    """
    Returns the rows of all architectures, in their order.

    Args:
        names (`Sequence[str]`): `kind/architecture` each.
        workers (`int`): Interpreters at work side by side.
        folder (`pathlib.Path`): For saved models, each deleted when it was reloaded.
    """
    # Heavy kinds stand together in the list, so that blocks are dealt out from all over it.
    count = -(-len(names) // BLOCK)
    blocks = [names[i::count] for i in range(count)]
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(names), desc="Architectures") as bar:
        results = list(pool.map(lambda i: _block(blocks[i], folder / str(i), bar), range(count)))
    rows = [row for result in results for row in result]
    order = {name: i for i, name in enumerate(names)}
    return sorted(rows, key=lambda row: order[f"{row.kind}/{row.architecture}"])


def _block(names: Sequence[str], folder: Path, bar: tqdm) -> list[Row]:
    """The rows of some architectures, trained in one interpreter and reloaded in another."""
    folder.mkdir(parents=True)
    rows: list[Row] = []
    left = list(names)
    while left:
        for line in _lines("round_trip.py", [str(folder), *left]):
            if "finished" in line:
                left.remove(line["finished"])
                bar.update()
            else:
                rows.append(Row(**line))
        if left:  # the interpreter died: of the architecture that it was at
            kind, _, architecture = left.pop(0).partition("/")
            rows.append(Row(kind, architecture, "stock", cause="the interpreter died"))
    saved = {row.folder: row for row in rows if row.result == "saved"}
    while waiting := [str(folder / name) for name, row in saved.items() if row.result == "saved"]:
        for line in _lines("stock_reload.py", waiting):
            row = saved[line["folder"]]
            row.result = "failed" if line["problem"] else "passed"
            row.cause = f"reload: {line['problem']}" if line["problem"] else row.cause
        still = [name for name, row in saved.items() if row.result == "saved"]
        if still:
            saved[still[0]].result, saved[still[0]].cause = "failed", "reload: the interpreter died"
    shutil.rmtree(folder)
    return rows


def _lines(script: str, arguments: list[str]) -> Iterable[dict]:
    """Runs a script beside this one and yields what it reports, line by line; a hang ends it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    limit = str(SECONDS * BLOCK)
    command = ["timeout", limit, sys.executable, str(HERE / script), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))


def releases() -> dict[str, str]:
    """Those that the rows depend on."""
    return {module.__name__: module.__version__.partition("+")[0] for module in (transformers, torch, timm)}


def report(rows: Sequence[Row], versions: dict[str, str]) -> str:
    """Returns the text of `coverage.md`: how many passed, a table for each kind, and every cause."""
    text = [
        "# Coverage",
        "",
        ", ".join(f"{name} {release}" for name, release in versions.items())
        + ", CPU, float32. Made by `python examples/benchmarks/coverage/coverage.py`,",
        "whose docstring says what passing takes. The columns of the families count the layers that became late-phase",
        "weights; `tied` is an output layer that shares its weight with the embedding (replicating one side would",
        "untie them), `–` a model without such layers. `generate()` says whether the tokens were compared.",
        "",
        markdown(["", "classes", "built", "stock passes", "late-phase passes of these"], 1, _summary(rows)),
    ]
    for kind in TITLES:
        own = [row for row in rows if row.kind == kind]
        if own:
            text += [f"## {TITLES[kind]}", "", _table(own), _causes(own), _missed(own)]
    return "\n".join(text).rstrip() + "\n"


def read_rows(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows of an earlier sweep, and the releases that they are of."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in record["rows"]], record["releases"]


def by_architecture(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Groups rows by kind and architecture, then by family."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.architecture), {})[row.family] = row
    return groups


def verdict(families: dict[str, Row]) -> str:
    """What the rows of one architecture amount to."""
    if families["stock"].result != "passed":
        return "stock fails"
    late = [row.result for family, row in families.items() if family != "stock"]
    return "failed" if "failed" in late else "passed" if "passed" in late else "no layer"


def _summary(rows: Sequence[Row]) -> list[list[str]]:
    table = []
    for kind, title in TITLES.items():
        groups = by_architecture(row for row in rows if row.kind == kind)
        if groups:
            verdicts = [verdict(families) for families in groups.values()]
            built = sum(not families["stock"].cause.startswith("build") for families in groups.values())
            stock = len(verdicts) - verdicts.count("stock fails")
            table.append([title, *map(str, (len(groups), built, stock, verdicts.count("passed")))])
    return table


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for (_, architecture), families in by_architecture(rows).items():
        cells = [_cell(families.get(family)) for family in FAMILIES]
        generates = "yes" if families["stock"].generates else "–"
        lines.append([architecture, families["stock"].class_name, verdict(families), *cells, generates])
    return markdown(["architecture", "class", "result", *FAMILIES, "generate()"], 3, lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.result == "no layer":
        return "tied" if "is tied" in row.cause else "–"
    return str(row.layers) if row.result == "passed" else "failed"


def _causes(rows: Sequence[Row]) -> str:
    """A list of all that did not pass, or passed without `generate()`."""
    lines = []
    for (_, architecture), families in by_architecture(rows).items():
        for family, row in families.items():
            if row.cause and row.result != "no layer":
                lines.append(f"- {architecture}, {family}: {row.cause.replace('|', '/')}")
    return "\n".join(["Causes:", "", *lines, ""]) if lines else ""


def _missed(rows: Sequence[Row]) -> str:
    """A list of the weights that rank-1 factors and norms leave alone, by class."""
    owners: dict[str, list[str]] = {}
    for row in rows:
        for name in row.missed:
            owners.setdefault(f"{row.family}: `{name}`", []).append(row.architecture)
    lines = [f"- {name} in {', '.join(names)}" for name, names in sorted(owners.items())]
    head = "Left alone, as no layer of the family (embeddings and output layers aside):"
    return "\n".join([head, "", *lines, ""]) if lines else ""


def main() -> None:
    """Runs the sweep and writes its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", choices=list(TITLES), default=list(TITLES), help="Of others the last sweep's rows stay."
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Interpreters side by side.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Where the table goes.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = sweep(architectures(arguments.kinds), arguments.workers, Path(folder))
    figures = arguments.output.with_suffix(".json")
    if figures.exists():
        rows += [row for row in read_rows(figures)[0] if row.kind not in arguments.kinds]
    record = {"releases": releases(), "rows": [asdict(row) for row in rows]}
    figures.write_text(json.dumps(record).replace('{"kind"', '\n{"kind"') + "\n", encoding="utf-8")
    arguments.output.write_text(report(rows, releases()), encoding="utf-8")
    for line in _summary(rows):
        print(*line)


if __name__ == "__main__":
    main()
