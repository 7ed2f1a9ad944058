"""A copy of the installed vLLM with the source patches, made once per session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.real_models import ROOT


@pytest.fixture(scope="session")
def patched_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the copy, to be put on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("patched")
    command = [sys.executable, str(ROOT / "patches" / "apply.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"PYTHONPATH={folder}" in done.stdout
    return folder
