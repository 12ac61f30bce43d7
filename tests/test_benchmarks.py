"""The figures in the documentation are those of the recorded runs."""

from __future__ import annotations

import json

import language_models


def test_tables_are_made_from_the_figures() -> None:
    figures = json.loads(language_models.RESULTS.read_text(encoding="utf-8"))
    table = language_models.table(figures["runs"])
    assert len(table.splitlines()) == 2 + 2 * 2 * 4
    assert table == language_models.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    readme = language_models.README.read_text(encoding="utf-8")
    assert readme == language_models.put_into_readme(readme, table)


def test_every_method_ran_with_every_seed() -> None:
    runs = json.loads(language_models.RESULTS.read_text(encoding="utf-8"))["runs"]
    seeds: dict[tuple[str, str, str], set[int]] = {(r["model"], r["schedule"], r["method"]): set() for r in runs}
    for r in runs:
        seeds[r["model"], r["schedule"], r["method"]].add(r["seed"])
    assert set(map(frozenset, seeds.values())) == {frozenset({0, 1, 2})}


def test_a_figure_that_is_not_the_runs_shows() -> None:
    table = language_models.table(json.loads(language_models.RESULTS.read_text(encoding="utf-8"))["runs"])
    readme = language_models.README.read_text(encoding="utf-8").replace(table, table.replace("2.5", "2.4", 1))
    assert readme != language_models.put_into_readme(readme, table)
