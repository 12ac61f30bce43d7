"""The documentation: written to be read, and the reference shows what docstrings say."""

from __future__ import annotations

import base64
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
# Tables of releases and of other libraries, for the most part.
OTHERS = {"averaging.md", "support.md"}
PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in OTHERS)]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

spec = importlib.util.spec_from_file_location("hf_docstrings", ROOT / "docs" / "hf_docstrings.py")
assert spec is not None and spec.loader is not None
hf_docstrings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf_docstrings)


def prose(page: Path) -> str:
    """A page without code, tables and comments."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^(\||<!--|:::|    ).*$", "", text, flags=re.MULTILINE)


def sentences(text: str) -> list[str]:
    parts = re.split(r"\n\s*\n|^\s*(?:[-*] |\d+\. |#+ )", text, flags=re.MULTILINE)
    return [" ".join(found.split()) for part in parts for found in re.split(r"(?<=[.:;?!])\*{0,2}\s", part)]


@every_page
def test_sentences_are_short_and_lines_wrapped(page: Path) -> None:
    assert not [line for line in prose(page).splitlines() if len(line) > 100]
    long = [found for found in sentences(prose(page)) if len(re.findall(r"[\w'.,%/-]*\w", found)) > 30]
    assert not long


def test_the_readme_takes_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"\b(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_members_plot_is_the_notebooks() -> None:
    notebook = json.loads((ROOT / "examples" / "toy" / "members_around_their_mean.ipynb").read_text(encoding="utf-8"))
    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    first = next(output["data"]["image/png"] for output in shown if "image/png" in output.get("data", {}))
    assert base64.b64decode(first) == (ROOT / "docs" / "members.png").read_bytes()


# ---- docstrings ----

WRITTEN = """
    Does it, as [`~Thing.other`] and [`torch.nn.Module`] do.

    Args:
        name (`str`, *optional*, defaults to `"a (b)"`):
            What it is.
        thing ([`Thing`], *optional*):
            Another.
        height (`int`), width (`int`, defaults to 1):
            In pixels,
            both.

    Returns:
        `dict[str, float]`: Figures.

    Raises:
        `FileNotFoundError`, `ValueError`: If it fails.
"""
READ = """
    Does it, as [`other`][package.Thing.other] and `torch.nn.Module` do.

    Args:
        name (str):
            What it is.
        thing (Thing):
            Another.
        height (int):
            In pixels,
            both.
        width (int):
            In pixels,
            both.

    Returns:
        dict[str, float]: Figures.

    Raises:
        FileNotFoundError, ValueError: If it fails.
"""


def test_docstrings_are_read() -> None:
    plain = hf_docstrings.plain(inspect.cleandoc(WRITTEN), {"Thing": "package.Thing"})
    assert plain == inspect.cleandoc(READ)
