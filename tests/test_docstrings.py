"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import hf_latephase


MODULES = [module.name for module in pkgutil.walk_packages(hf_latephase.__path__, "hf_latephase.")]


class Fenced(doctest.DocTestParser):
    """Reads examples in Markdown's fences, whose end would count as output."""

    def parse(self, string: str, name: str = "<string>") -> list:
        lines = ["" if line.strip().startswith("```") else line for line in string.splitlines()]
        return super().parse("\n".join(lines), name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(parser=Fenced()), doctest.DocTestRunner()
    for example in finder.find(module, name):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_there_are_examples() -> None:
    found = doctest.DocTestFinder(parser=Fenced()).find(hf_latephase.LatePhase)
    assert sum(len(example.examples) for example in found) > 5
