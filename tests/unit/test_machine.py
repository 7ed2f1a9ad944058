"""Results name the commit of the package's own checkout, and of no other repository around it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from vllm_sirius.measuring.machine import describe_machine, describe_source
from vllm_sirius.version import __version__

VERSION = f"v{__version__}"


def git(folder: Path, *arguments: str) -> None:
    user = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    subprocess.run(["git", "-C", folder, *user, *arguments], check=True, capture_output=True)


def package_in(root: Path) -> Path:
    (root / "vllm_sirius").mkdir(parents=True)
    (root / "vllm_sirius" / "version.py").write_text("")
    return root


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Somebody's repository with one commit and everything in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "README").write_text("")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_its_own_checkout(repository: Path) -> None:
    package_in(repository)
    assert describe_source(repository) == VERSION, "not part of the repository yet"
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "second")
    assert re.fullmatch("[0-9a-f]{12}", describe_source(repository))
    (repository / "vllm_sirius" / "version.py").write_text("changed")
    assert re.fullmatch("[0-9a-f]{12}-dirty", describe_source(repository))


def test_a_repository_around_it(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = package_in(repository / "environment" / "site-packages")
    assert describe_source(inside) == VERSION
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "even with the package")
    assert describe_source(inside) == VERSION
    outside = package_in(tmp_path / "elsewhere")
    assert describe_source(outside) == VERSION
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert describe_source(outside) == VERSION


def test_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert describe_source(repository) == VERSION


def test_the_version_is_that_of_the_code_that_runs() -> None:
    assert describe_machine()["vllm_sirius"] == f"vllm-sirius {__version__}"
