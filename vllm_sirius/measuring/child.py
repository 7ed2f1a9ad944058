"""Programs of this package in processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import vllm_sirius

PROGRAM = (
    "import runpy, sys; root, module = sys.argv[1:3]; del sys.argv[1:3]; sys.path.insert(0, root); "
    "import vllm_sirius; sys.path.remove(root); sys.path.append(root); "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
"""Takes this very package, installed or not, and everything else from where Python has it: a file that happens to be called
``json.py`` in the current folder, or beside the package, must not run. So the folder of the package comes last."""


def python_command(module: str, *arguments: str, checkout: Path | None = None) -> list[str]:
    """A command that runs a module of this package as a program, whatever the current folder holds.

    Args:
        module: Its name.
        *arguments: What it finds in ``sys.argv``.
        checkout: A folder with another copy of the package, which runs in the place of this one.
    """
    root = checkout or Path(vllm_sirius.__file__).resolve().parents[1]
    return [sys.executable, "-P", "-c", PROGRAM, str(root), module, *arguments]


def child_environment(**variables: str) -> dict[str, str]:
    """Variables of this process, and what keeps the current folder out of the path of all Python that the child starts.

    Args:
        **variables: More of them.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", **variables}
