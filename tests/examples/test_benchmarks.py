"""The figures in the documentation are those of the recorded runs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import averages as averages_benchmark
import flatness
import image_classifiers
import language_models
import runs
import speed
import texts
from estimate import estimate
from runs import PERFORMANCE_PAGE, RESULTS_PAGE, with_table


BENCHMARKS = {"language_models": language_models, "image_classifiers": image_classifiers}
every_benchmark = pytest.mark.parametrize("name", BENCHMARKS)


def figures(benchmark: ModuleType) -> list[dict[str, Any]]:
    return json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))["runs"]


@every_benchmark
def test_tables_are_made_from_the_figures(name: str) -> None:
    benchmark = BENCHMARKS[name]
    table = benchmark.table(figures(benchmark))
    assert table == benchmark.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    page = RESULTS_PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, name, table)
    # A figure that is not the runs' would show.
    assert page != with_table(page, name, table.replace("2", "3", 1))


def test_the_default_average_is_never_far_behind_the_raw_weights() -> None:
    records = figures(averages_benchmark)
    table, page = averages_benchmark.table(records), averages_benchmark.DOCS.read_text(encoding="utf-8")
    assert page == with_table(page, "averages", table)
    runs_of = {(record["model"], record["steps"]) for record in records}
    assert runs_of == {(name, steps) for name in averages_benchmark.MODELS for steps in (200, 500, 2000)}
    worst = {"bits": 0.01, "points": 0.3}
    rows = averages_benchmark.rows_of(records)
    assert len(rows) == 9
    for title, _, _, _, lag in rows:
        assert float(lag.split()[0]) <= next(limit for unit, limit in worst.items() if unit in title)


@pytest.mark.parametrize(("name", "device"), [("speed", "cpu"), ("speed_cuda", "cuda")])
def test_speed_table_is_made_from_the_figures(name: str, device: str) -> None:
    record = json.loads((Path(speed.__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    table = speed.table(record)
    page = PERFORMANCE_PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, name, table)
    compared = {row["row"] for row in record["rows"] if not row["row"].startswith(speed.WITH_ITSELF)}
    assert compared == {setting.name for setting, _ in speed.ROWS[device]}
    assert all(row["pairs"] >= speed.LEAST_PAIRS[device] for row in record["rows"])


def test_flatness_table_is_made_from_the_figures() -> None:
    record = json.loads(Path(flatness.__file__).with_suffix(".json").read_text(encoding="utf-8"))
    results = [flatness.Flatness(**result) for result in record["results"]]
    table = flatness.table(results, record["distances"]) + "\n"
    page = RESULTS_PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, "flatness", table)


def test_the_reckoning_of_a_large_model() -> None:
    text = estimate()
    page = " ".join(PERFORMANCE_PAGE.read_text(encoding="utf-8").split())
    # What the documentation says of it.
    assert "15.7 % eager, 6.5 % if fused" in text
    assert "16 % in eager mode at 4,096 tokens a GPU, 7 % if fused" in page


def test_every_language_model_ran_with_every_seed() -> None:
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for r in figures(language_models):
        seeds.setdefault((r["model"], r["schedule"], r["method"]), set()).add(r["seed"])
    assert len(seeds) == 2 * 2 * 4
    assert set(map(frozenset, seeds.values())) == {frozenset({0, 1, 2})}


def test_every_image_classifier_ran_with_its_seeds() -> None:
    seeds: dict[str, set[int]] = {}
    for r in figures(image_classifiers):
        seeds.setdefault(r["method"], set()).add(r["seed"])
    methods = {method for group in image_classifiers.GROUPS for method in group}
    assert {name.partition(",")[0] for name in seeds} == methods | {"deep_ensemble"}
    assert {f"{method}, EMA" for method in image_classifiers.EMA_METHODS} <= set(seeds)
    for name, own in seeds.items():
        # The deep ensemble trains K networks: once, by design.
        assert own == ({0} if name.startswith("deep_ensemble") else {0, 1, 2}), name


def test_a_run_with_ema_adds_its_averages_only() -> None:
    def names(ema_decay: float | None, average: str) -> list[str]:
        results = [
            {"method": method, "variant": variant, "minutes": 1.0, "scores": {"test": {}}, "ood_auroc": {}}
            for method in ("base", "late_phase")
            for variant in ("", average, f"{average}, ensemble")
        ]
        report = {"settings": {"ema_decay": ema_decay}, "results": results}
        return [record["method"] for record in image_classifiers.records_of(report)]

    late = ["late_phase", "late_phase, SWA", "late_phase, SWA, ensemble"]
    assert names(None, "SWA") == ["base", *late]  # base with SWA is the method swa
    averages = ["EMA", "EMA, ensemble"]
    assert names(0.98, "EMA") == [f"{method}, {name}" for method in ("base", "late_phase") for name in averages]


def test_a_page_without_the_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="has no line '<!-- here -->'"):
        with_table("text", "here", "table")


# ---- the larger text ----


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A source package in place of the real one, and a pip that copies it."""
    archive = tmp_path / "pages-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in (
            ("docs/b.txt", b"bee"),
            ("docs/a.txt", b"ant"),
            ("docs/c.rst", b"no"),
            ("src/d.txt", b"no"),
        ):
            info = tarfile.TarInfo(f"pages-1/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))

    def pip(command, **kwargs):
        shutil.copy(archive, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(texts.subprocess, "run", pip)
    return archive


def test_the_larger_text_is_all_pages_and_verified(package, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "text"
    with pytest.raises(RuntimeError, match="not the text that the recorded figures are of"):
        texts.write_text(path)
    assert not path.parent.exists()
    # Pages by the checksum of their names, whatever their order in the archive.
    pages = {b"docs/a.txt": b"ant", b"docs/b.txt": b"bee"}
    expected = b"\n".join(pages[name] for name in sorted(pages, key=lambda name: hashlib.sha256(name).digest()))
    monkeypatch.setattr(texts, "SHA256", hashlib.sha256(expected).hexdigest())
    for _ in range(2):
        texts.write_text(path)
        assert path.read_bytes() == expected
        assert list(path.parent.iterdir()) == [path]  # nothing half-written
        path.write_bytes(b"another text")
    texts.write_text(path)
    # A text that is there is not fetched again.
    monkeypatch.setattr(texts.subprocess, "run", None)
    texts.write_text(path)


def test_a_text_that_pip_cannot_fetch(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(texts.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="could not download Django.*no matching distribution.*--data_file"):
        texts.write_text(tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_runs_side_by_side_have_a_thread_each(tmp_path) -> None:
    """In a benchmark whose own file imports torch, too: it made evidence four times as slow."""
    (tmp_path / "threads.py").write_text("import torch\ndef main(arguments):\n    print(torch.get_num_threads())\n")
    (tmp_path / "benchmark.py").write_text(
        "from pathlib import Path\nimport torch\nfrom runs import Run, run_all\n"
        "if __name__ == '__main__':\n    run_all([Run(Path('out'), 'threads.py', [], {})], workers=1)\n"
    )
    paths = [str(tmp_path), str(Path(runs.__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "benchmark.py"], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "out" / "log.txt").read_text() == "1\n"


def test_a_recorded_command_names_no_folder_of_the_machine(monkeypatch) -> None:
    words = ["examples/a.py", "--dataset", "/home/me/data/cifar10", "--data_file=/tmp/enwik6", "--steps", "2/3"]
    monkeypatch.setattr("sys.argv", words)
    shown = "examples/a.py --dataset path/to/cifar10 --data_file=path/to/enwik6 --steps 2/3"
    assert runs.command_line() == f"python {shown}"
    recorded = [path.read_text(encoding="utf-8") for path in runs.EXAMPLES.rglob("*.json")]
    commands = [line for text in recorded for line in text.splitlines() if '"command"' in line]
    assert len(commands) > 5 and not [line for line in commands if re.search(r"[ =]/", line)]
