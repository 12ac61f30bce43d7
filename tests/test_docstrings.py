"""The examples in docstrings run and print what they say; what users call is described whole."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

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


# ---- what users call by name ----

PUBLIC = ["hf_latephase", *(f"hf_latephase.{name}" for name in ("analysis", "data", "metrics", "models"))]


def described() -> Iterator[tuple[str, Any]]:
    """The public classes and functions, and the public methods that our classes define or replace."""
    for package in map(importlib.import_module, PUBLIC):
        for name in package.__all__:
            found = getattr(package, name)
            if not (inspect.isclass(found) or inspect.isroutine(found)):
                continue  # a constant, or a type
            yield f"{package.__name__}.{name}", found
            for method, value in vars(found).items() if inspect.isclass(found) else ():
                if not method.startswith("_") and isinstance(value, (property, cached_property, classmethod)):
                    yield f"{name}.{method}", getattr(value, "fget", None) or getattr(value, "__func__", value)
                elif not method.startswith("_") and inspect.isfunction(value):
                    yield f"{name}.{method}", value


DESCRIBED = dict(described())


def sections(docstring: str) -> dict[str, str]:
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises):$", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parameters(called: Any) -> tuple[set[str], bool]:
    """The names of the parameters that it has itself, not by inheritance, and whether it takes any others."""
    if inspect.isclass(called) and not {"__init__", "__annotations__"} & set(vars(called)):
        return set(), True
    taken = inspect.signature(called).parameters.values()
    names = {
        p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("self", "cls")
    }
    if inspect.isclass(called):
        own = vars(called).get("__annotations__") or (names if "__init__" in vars(called) else ())
        return names & set(own), True
    return names, len(names) < len(taken) - ("self" in inspect.signature(called).parameters)


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_public_is_described_whole(name: str) -> None:
    called, docstring = DESCRIBED[name], DESCRIBED[name].__doc__
    assert docstring and docstring.strip()
    assert docstring.count("```") % 2 == 0, "a fence is open"
    found, (names, takes_others) = sections(docstring), parameters(called)
    listed = re.findall(
        r"^    ([\w, ]+?)(?: \(.*)?:$", found.get("Args", "") + found.get("Attributes", ""), re.MULTILINE
    )
    listed_names = {name for line in listed for name in line.split(", ")}
    if listed_names or (inspect.isclass(called) and not issubclass(called, (tuple, dict))):
        assert names <= listed_names, "a parameter is not described"
        assert takes_others or listed_names <= names, "what is described is no parameter"
    if listed_names and not inspect.isclass(called) and called.__annotations__.get("return") != "None":
        assert "Returns" in found or re.match(r"\s*Returns", docstring), "what it returns is not described"


@pytest.mark.parametrize("name", DESCRIBED)
def test_references_lead_somewhere(name: str) -> None:
    ours = {attribute for module in MODULES for attribute in vars(importlib.import_module(module))}
    for reference in re.findall(r"\[`~?([\w.]+)`\]", DESCRIBED[name].__doc__):
        first, _, rest = reference.partition(".")
        if first in ours:
            found: Any = next(vars(m)[first] for m in map(importlib.import_module, MODULES) if first in vars(m))
        else:
            # transformers' own docstrings leave its name out.
            package = "transformers." if first == "modeling_outputs" else ""
            found = importlib.import_module(package + first)
        for part in filter(None, rest.split(".")):
            found = getattr(found, part)
