"""Rooms of the package know each other in one direction, the one that docs/layout.md names."""

from __future__ import annotations

import ast
from pathlib import Path

from support.real_models import ROOT

PACKAGE = ROOT / "vllm_sirius"
LEAVES = {"config", "errors", "method", "metrics", "version"}
"""Files that every room may know, and that know no room."""
MAY_KNOW = {
    "sparsity": set[str](),
    "weights": {"sparsity"},
    "kernels": {"weights"},
    "offload": {"kernels", "weights"},
    "target": {"kernels", "offload"},
    "draft": {"kernels", "weights", "sparsity"},
    "pacing": set(),
    "drafting": {"pacing"},
    "integration": {
        *("sparsity", "weights", "kernels", "offload", "target", "draft", "pacing", "drafting"),
        *("acceptance", "request_rules"),
    },
    "environment": {"plugin"},
    "measuring": {"integration", "environment"},
    "tuning": {"measuring", "pacing", "request_rules"},
    "acceptance": set(),
    "request_rules": set(),
    "plugin": {"integration"},
    "cli": {"environment", "integration", "measuring", "offload", "tuning"},
    "__main__": {"cli"},
    "__init__": set(),
}


def room_of(file: Path) -> str:
    inside = file.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else file.stem


def imports_of(file: Path) -> set[str]:
    """Names of all modules that a file imports, wherever it does, as deep as they are written."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def known_rooms(file: Path) -> set[str]:
    parts = [name.split(".") for name in imports_of(file)]
    named = {part[1] for part in parts if part[0] == "vllm_sirius" and len(part) > 1}
    return {name for name in named if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_no_room_knows_one_above_it() -> None:
    rooms = {room_of(file) for file in FILES}
    assert rooms == {*MAY_KNOW, *LEAVES}
    wrong = {
        str(file.relative_to(ROOT)): sorted(unknown)
        for file in FILES
        if (unknown := known_rooms(file) - MAY_KNOW.get(room_of(file), set()) - LEAVES - {room_of(file)})
    }
    assert wrong == {}


def test_only_integration_and_what_runs_engines_know_vllm() -> None:
    knowing = {room_of(file) for file in FILES if any(name.split(".")[0] == "vllm" for name in imports_of(file))}
    assert knowing == {"integration", "plugin", "measuring"}
