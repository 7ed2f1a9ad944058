"""An environment as pip leaves it: the project's wheel beside vLLM's CPU build, without the repairs.

Installing vLLM takes gigabytes, so every package of the environment that runs the tests is linked into a new one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from support.real_models import ROOT
from support.snippets import INSTALLING, documented_command, readme_command

OWN_OR_REPAIRED = ("vllm-", "vllm_sirius", "__editable__", "torchvision", "torchaudio", "torchcodec")
COMPILERS = ("gcc", "g++", "c++", "clang")
TIMEOUT = 300


class WheelEnvironment:
    """A virtual environment with links to the packages of this one.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder], check=True)
        self.packages = next(self.folder.glob("lib/python*/site-packages"))
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(OWN_OR_REPAIRED):
                (self.packages / entry.name).symlink_to(entry)
        sources = self._sources(folder)
        self.installed = self._pip(sources, *readme_command("pip install"))
        self._pip(sources, *documented_command(INSTALLING, "pip wheel"))
        (wheel,) = sources.glob("*.whl")
        requirement = "vllm-sirius[cpu] @ file:///PATH/vllm_sirius-0.1.0-py3-none-any.whl"
        place = {requirement: f"vllm-sirius[cpu] @ {wheel.as_uri()}"}
        command = documented_command(INSTALLING, f'pip install "{requirement}"', **place)
        self.installed += self._pip(sources, *command, "--force-reinstall")
        shutil.rmtree(sources)

    def _pip(self, sources: Path, *command: str) -> str:
        """What pip says; it installs no dependencies, since they are there."""
        assert command[0] == "pip"
        offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
        done = self.run("python", "-m", *command, *offline, folder=sources)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def _sources(self, folder: Path) -> Path:
        """A copy, because building leaves folders beside the sources."""
        copy = folder / "sources"
        copy.mkdir()
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
        )
        for name in files.stdout.decode().splitlines():
            if name.startswith("vllm_sirius/") or "/" not in name:
                target = copy / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_file():
                    target.write_bytes((ROOT / name).read_bytes())
        return copy

    def add_package(self, name: str, source: str) -> None:
        """Installs a module of one line, with what pip needs to remove it."""
        (self.packages / f"{name}.py").write_text(source)
        information = self.packages / f"{name}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (information / "INSTALLER").write_text("pip\n")
        names = [f"{name}.py", *(f"{information.name}/{file}" for file in ("METADATA", "INSTALLER", "RECORD"))]
        (information / "RECORD").write_text("".join(f"{file},,\n" for file in names))

    def has(self, name: str) -> bool:
        """Whether a package is installed."""
        return any(self.packages.glob(f"{name}-*.dist-info"))

    def hide_compilers(self) -> dict[str, str]:
        """Variables with which programs of the environment find all that is on the path but for compilers."""
        folder = self.folder / "without_compilers"
        if not folder.exists():
            folder.mkdir()
            for entry in (
                entry for part in os.get_exec_path() if Path(part).is_dir() for entry in Path(part).iterdir()
            ):
                place = folder / entry.name
                if not any(name in entry.name for name in COMPILERS) and entry.name != "cc" and not place.is_symlink():
                    place.symlink_to(entry)
        return {"PATH": str(folder), "CC": "", "CXX": ""}

    def run(
        self, program: str, *arguments: str, folder: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment, in a folder without modules or in the one given."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
        return subprocess.run(
            [self.folder / "bin" / program, *arguments],
            env={**kept, **variables},
            cwd=folder or self.folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def doctor(self, *arguments: str, **variables: str) -> tuple[int, Any, str]:
        """Status, report and standard error of ``vllm-sirius doctor --json``."""
        found = self.run("vllm-sirius", "doctor", "--json", *arguments, **variables)
        return found.returncode, json.loads(found.stdout) if found.stdout else None, found.stderr
