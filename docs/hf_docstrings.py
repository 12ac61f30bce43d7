"""
Lets mkdocstrings read the docstrings of this package: an extension of griffe, named in `mkdocs.yml`.

Hugging Face writes a parameter as ``name (`type`, *optional*):``, an error as `` `ValueError`: ``, and a reference as
``[`~LatePhase.detach`]``. Griffe's google style takes the first two without the marks, autorefs the third with its
full name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import griffe


SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$")
PARAMETER = re.compile(r"^( {4}\w+) \((.*)\):$")
SHARED = re.compile(r"^ {4}(\w+(?: \([^)]*\))?(?:, \w+(?: \([^)]*\))?)+):$")
ITEM = re.compile(r"\w+(?: \([^)]*\))?")
OUTCOME = re.compile(r"^( {4})((?:\[?`[^`]+`\]?(?:, | or )?)+):(?= |$)")
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


def plain(docstring: str, addresses: dict[str, str]) -> str:
    """
    Rewrites a docstring for griffe.

    Args:
        docstring (`str`):
            As it stands in the code.
        addresses (`dict[str, str]`):
            Where the reference describes a name: `{"LatePhase": "hf_latephase.LatePhase"}`.

    Returns:
        `str`: The same in google style, its references in Markdown.
    """
    section, lines = "", []
    for line in one_by_one(docstring):
        if line and not line.startswith(" "):
            found = SECTION.match(line)
            section = found[1] if found else ""
        elif section in ("Args", "Attributes"):
            line = PARAMETER.sub(lambda m: f"{m[1]} ({bare(m[2])}):", line)
        elif section:
            line = OUTCOME.sub(lambda m: f"{m[1]}{bare(m[2])}:", line)
        lines.append(line)
    return REFERENCE.sub(lambda m: reference(m[1], m[2], addresses), "\n".join(lines))


def one_by_one(docstring: str) -> Iterator[str]:
    """The lines of a docstring, parameters that share a description (`height, width:`) each with a copy of it."""
    lines = docstring.splitlines()
    for index, line in enumerate(lines):
        found = SHARED.match(line)
        if found is None:
            yield line
            continue
        description = list(itertools.takewhile(lambda text: text.startswith(" " * 8), lines[index + 1 :]))
        *others, last = ITEM.findall(found[1])
        for item in others:
            yield from (f"    {item}:", *description)
        yield f"    {last}:"


def bare(text: str) -> str:
    """A type without marks, and without what the signature says already: its default."""
    text = re.sub(r", (\*optional\*|defaults to .*)", "", text)
    return re.sub(r"\[?`~?([^`]+)`\]?", r"\1", text)


def reference(short: str, name: str, addresses: dict[str, str]) -> str:
    """A reference in Markdown; the name alone where the reference has no such entry."""
    first, _, rest = name.partition(".")
    address = addresses.get(first)
    shown = name.rpartition(".")[2] if short else name
    return f"[`{shown}`][{address}{'.' if rest else ''}{rest}]" if address else f"`{shown}`"


class HuggingFaceDocstrings(griffe.Extension):
    """
    Rewrites every docstring of a package once it is loaded.

    Args:
        public (`list[str]`):
            Modules whose names the reference describes.
    """

    def __init__(self, public: list[str]) -> None:
        super().__init__()
        self.public = public

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called by griffe."""
        addresses = {}
        for path in self.public:
            module = pkg[path.partition(".")[2]] if "." in path else pkg
            own = [name for name, member in module.members.items() if not (name.startswith("_") or member.is_alias)]
            addresses.update({str(name): f"{path}.{name}" for name in module.exports or own})
        self._rewrite(pkg, addresses)

    def _rewrite(self, described: Any, addresses: dict[str, str]) -> None:
        if described.docstring is not None:
            described.docstring.value = plain(described.docstring.value, addresses)
        for member in described.members.values():
            if not member.is_alias:
                self._rewrite(member, addresses)
