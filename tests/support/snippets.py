"""The commands and programs that the documentation shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from support.real_models import ROOT

README = ROOT / "README.md"
INSTALLING = ROOT / "docs" / "install.md"
USAGE = ROOT / "docs" / "usage.md"


def code_blocks(path: Path, language: str) -> list[str]:
    """Code of one language in a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Command lines, continued ones joined, without comments."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip()]


def documented_command(document: Path, start: str, **places: str) -> list[str]:
    """The words of the only command in a document that starts so, with other words for its placeholders."""
    found = [line for block in code_blocks(document, "bash") for line in commands(block) if line.startswith(start)]
    assert len(found) == 1, f"{document.name} has {found or 'nothing'} for {start!r}"
    return [places.get(word, word) for word in shlex.split(found[0])]


def readme_command(start: str, **places: str) -> list[str]:
    """The same of the README. `tests/unit/test_snippets.py` reads from these calls which test runs which command."""
    return documented_command(README, start, **places)


def documented_program(document: Path, words: str) -> str:
    """The only Python program in a document with these words in it."""
    (found,) = [block for block in code_blocks(document, "python") if words in block]
    return found


def readme_program(words: str) -> str:
    """The same of the README."""
    return documented_program(README, words)
