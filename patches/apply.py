"""Makes a copy of the installed vLLM that knows the method `sirius` without runtime hooks.

    python patches/apply.py FOLDER

copies the package `vllm` of the Python that runs this into FOLDER and applies the patches for its version. The copy is
used by putting FOLDER first on PYTHONPATH; the installed package stays as it is. Needs `git`, for `git apply` alone: no
history of vLLM.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PATCHES = Path(__file__).resolve().parent
LINKED_SUFFIXES = (".so",)
"""Compiled extensions, which no patch touches and which are most of the package's bytes."""


class ApplyError(Exception):
    """Says what keeps the series from being applied."""


def installed_package() -> Path:
    """Folder of the installed package; finding it does not import vLLM."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ApplyError("vLLM is not installed for this Python: run it with the environment's own.")
    return Path(spec.origin).parent


def series_for(package: Path) -> list[Path]:
    """The patches for a package's version, in order."""
    found = re.search(
        r"^__version__ = .*'([0-9.]+)", (package / "_version.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    version = found[1] if found else "of an unknown version"
    series = sorted((PATCHES / f"vllm-{version}").glob("*.patch"))
    if not series:
        known = ", ".join(sorted(path.name for path in PATCHES.glob("vllm-*")))
        raise ApplyError(f"there are no patches for vLLM {version}, only for {known}.")
    return series


def copy_package(package: Path, folder: Path) -> Path:
    """Copies a package; compiled extensions become links to the originals.

    Args:
        package: The package.
        folder: Where the copy goes, made if missing.

    Returns:
        The copy.
    """
    copy = folder / package.name
    if copy.exists():
        raise ApplyError(f"{copy} exists: remove it first.")

    def copy_or_link(source: str, target: str) -> None:
        if source.endswith(LINKED_SUFFIXES):
            Path(target).symlink_to(source)
        else:
            shutil.copy2(source, target)

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(package, copy, copy_function=copy_or_link)
    return copy


def apply_series(series: list[Path], copy: Path) -> None:
    """Applies patches to a copy of the package, at the exact context; removes the copy if one does not fit.

    Args:
        series: The patches, in order.
        copy: The copy.
    """
    folder = copy.parent
    # Git must not take the folder for a part of a repository around it: it would then skip every file in silence.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    command = ["git", "apply", *(str(path) for path in series)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(copy)
        raise ApplyError(f"the patches do not fit {folder}:\n{done.stderr}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for the copy")
    folder = parser.parse_args().folder.resolve()
    try:
        package = installed_package()
        series = series_for(package)
        copy = copy_package(package, folder)
        apply_series(series, copy)
    except ApplyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Applied {len(series)} patches of {series[0].parent.name} to a copy of {package}.")
    print(f"Use it:  PYTHONPATH={folder} vllm serve MODEL --speculative-model sirius")
    return 0


if __name__ == "__main__":
    sys.exit(main())
