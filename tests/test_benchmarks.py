"""The figures in the documentation are those of the recorded runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import flatness
import image_classifiers
import language_models
import pytest
import speed
from estimate import estimate
from runs import README, put_into_readme


BENCHMARKS = {"language_models": language_models, "image_classifiers": image_classifiers}
every_benchmark = pytest.mark.parametrize("name", BENCHMARKS)


def figures(benchmark: ModuleType) -> list[dict[str, Any]]:
    return json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))["runs"]


@every_benchmark
def test_tables_are_made_from_the_figures(name: str) -> None:
    benchmark = BENCHMARKS[name]
    table = benchmark.table(figures(benchmark))
    assert table == benchmark.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    assert readme == put_into_readme(readme, name, table)
    # A figure that is not the runs' would show.
    assert readme != put_into_readme(readme, name, table.replace("2", "3", 1))


def test_speed_table_is_made_from_the_figures() -> None:
    record = json.loads(Path(speed.__file__).with_suffix(".json").read_text(encoding="utf-8"))
    table = speed.table(record)
    readme = README.read_text(encoding="utf-8")
    assert readme == put_into_readme(readme, "speed", table)
    assert {row["row"] for row in record["rows"][1:]} == {setting.name for setting, _ in speed.ROWS}
    assert all(row["pairs"] >= speed.LEAST_PAIRS for row in record["rows"])


def test_flatness_table_is_made_from_the_figures() -> None:
    record = json.loads(Path(flatness.__file__).with_suffix(".json").read_text(encoding="utf-8"))
    results = [flatness.Flatness(**result) for result in record["results"]]
    table = flatness.table(results, record["distances"]) + "\n"
    readme = README.read_text(encoding="utf-8")
    assert readme == put_into_readme(readme, "flatness", table)


def test_the_reckoning_of_a_large_model() -> None:
    text = estimate()
    readme = README.read_text(encoding="utf-8")
    # What the README says of it.
    assert "15.7 % eager, 6.5 % if fused" in text
    assert "16 % in eager mode at\n4,096 tokens a GPU, 7 % if fused" in readme


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
    for name, own in seeds.items():
        # The deep ensemble trains K networks: once, by design.
        assert own == ({0} if name.startswith("deep_ensemble") else {0, 1, 2}), name


def test_a_readme_without_the_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="has no line '<!-- here -->'"):
        put_into_readme("text", "here", "table")
