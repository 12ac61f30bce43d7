"""
Prints setup.py's floors as pip's constraints, for `make test-oldest`: the oldest releases of what is required.

    python tests/oldest.py > constraints.txt
"""

from __future__ import annotations

import ast
from pathlib import Path


SETUP = Path(__file__).resolve().parents[1] / "setup.py"


def floors(source: str) -> list[str]:
    """The requirements `name[extra]>=release` as `name==release`; those without a release are left to pip."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "INSTALL_REQUIRES":
            required = [requirement.split(">=") for requirement in ast.literal_eval(statement.value)]
            return [f"{name.partition('[')[0]}=={release}" for name, *releases in required for release in releases]
    raise ValueError("setup.py assigns no INSTALL_REQUIRES.")


def constraints(source: str) -> list[str]:
    """The floors as pip should take them."""
    # Of torch the plain build: pip would prefer one with a suffix (2.13.0+cpu), beside which torchvision's fails.
    return [f"{floor.replace('==', '===')}.0" if floor.startswith("torch==") else floor for floor in floors(source)]


if __name__ == "__main__":
    print("\n".join(constraints(SETUP.read_text(encoding="utf-8"))))
