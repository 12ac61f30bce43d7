"""The package's rooms, and which of them may know which: an import that runs upwards is an error."""

import ast
from pathlib import Path

import pytest

import hf_latephase


PACKAGE = Path(hf_latephase.__file__).parent

# A room may import from itself and from those that are listed; `compat` is what depends on a release of transformers.
LAYERS: dict[str, set[str]] = {
    "config": set(),
    "compat": set(),
    "core.weights": {"config"},
    "core": {"config", "core.weights"},
    "data": set(),
    "metrics": set(),
    "models": set(),
    "analysis": {"core", "compat", "data"},
    "publishing": {"core", "config", "compat"},
    "training.checkpoints": {"core"},
    "training": {"core", "core.weights", "config", "compat", "training.checkpoints", "publishing"},
    "": {"config", "core", "training"},
}


def room(module: str) -> str:
    """The innermost room that holds a module, both written without the package's name."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in LAYERS), "")


def imports(path: Path) -> set[str]:
    """Whole names of the modules that a file imports, whether when it is imported or later."""
    package = ["hf_latephase", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_upwards(path: Path) -> None:
    own = room(".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."))
    known = {room(name.partition(".")[2]) for name in imports(path) if name.startswith("hf_latephase.")} - {""}
    assert known <= {own, *LAYERS[own]}


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda path: path.name)
def test_the_core_knows_no_trainer(path: Path) -> None:
    assert not any("trainer" in part.lower() for name in imports(path) for part in name.split("."))
    assert not any(name.startswith("accelerate") for name in imports(path))


def test_every_room_is_listed_and_no_two_know_each_other() -> None:
    folders = {".".join(path.relative_to(PACKAGE).parent.parts) for path in FILES}
    assert folders <= set(LAYERS)
    lower: set[str] = set()
    for name, known in LAYERS.items():
        assert known <= lower, name
        lower.add(name)
