"""Makes the project's virtual environment: `environment.py [--venv .venv] [--build auto|cpu|cuda]`.

Owns running the steps of `environment_plan.py`, their progress on the screen, and the stamp that lets the
next call return at once. It needs nothing but a Python 3.11 or newer and runs before anything is installed.

The CPU build needs PyTorch's CPU wheels. Where pip's configuration does not lead to them (the public index
carries only the CUDA build of torch), name their index with `--torch-index URL` or SIRIUS_TORCH_INDEX.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import environment_plan as plan

STAMP = "sirius-setup.stamp"
GPU_QUERY_SECONDS = 30


class SetupError(Exception):
    """A failure that the user can act on; its text is the whole message."""


def has_nvidia_gpu() -> bool:
    """Tell whether an NVIDIA GPU answers.

    Returns:
        True when `nvidia-smi` lists at least one GPU.
    """
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            timeout=GPU_QUERY_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU " in answer.stdout


def check_python(version: tuple[int, ...]) -> None:
    """Refuse a Python that vLLM cannot run on.

    Args:
        version: Version numbers of the running Python.

    Raises:
        SetupError: It is too old.
    """
    if version[:2] < plan.MINIMUM_PYTHON:
        needed = ".".join(str(number) for number in plan.MINIMUM_PYTHON)
        found = ".".join(str(number) for number in version[:3])
        raise SetupError(f"Python {needed} or newer is needed and this is {found}; use make PYTHON3=python{needed}")


def missing_compilers() -> list[str]:
    """List the compilers that are not installed, as `vllm-sirius doctor` does.

    Returns:
        Names among gcc and g++, unless CC or CXX stands in for them.
    """
    # The package is not installed into the Python that runs this.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    try:
        from vllm_sirius.environment.checks import missing_compilers as missing
    finally:
        del sys.path[0]
    return missing()


def is_current(environment: Path, key: str) -> bool:
    """Tell whether the environment is the one that was asked for.

    Args:
        environment: Folder of the virtual environment.
        key: Key of what is asked for.

    Returns:
        True when the stamp of a finished set-up carries the key.
    """
    stamp = environment / STAMP
    return stamp.is_file() and stamp.read_text().strip() == key and python_of(environment).exists()


def python_of(environment: Path) -> Path:
    """Return the Python of a virtual environment.

    Args:
        environment: Folder of the virtual environment.

    Returns:
        Its path, whether or not it exists.
    """
    return environment / "bin" / "python"


def step_variables() -> dict[str, str]:
    """Give the variables that steps run with.

    Returns:
        Those of this process, and what keeps the current folder out of the path of Python and its children: a
        `json.py` that happens to lie there must not run.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def has_working_pip(environment: Path) -> bool:
    """Tell whether a virtual environment can be built upon.

    Args:
        environment: Folder of the virtual environment.

    Returns:
        False when it is missing or was left unfinished.
    """
    if not python_of(environment).exists():
        return False
    command = [str(python_of(environment)), "-m", "pip", "--version"]
    return subprocess.run(command, env=step_variables(), capture_output=True, check=False).returncode == 0


def owner_of(environment: Path) -> Path | None:
    """Find the checkout whose package is installed in an environment as it lies there.

    Args:
        environment: Folder of the virtual environment.

    Returns:
        Its folder; None where there is none, or none any more.
    """
    for record in environment.glob("lib/python*/site-packages/vllm_sirius-*.dist-info/direct_url.json"):
        source = json.loads(record.read_text())
        folder = Path(unquote(urlsplit(source.get("url", "")).path))
        if source.get("dir_info", {}).get("editable") and (folder / "setup.py").is_file():
            return folder
    return None


def check_owner(environment: Path) -> None:
    """Refuse an environment whose programs run another checkout: setting it up here would make them run this one.

    Args:
        environment: Folder of the virtual environment.

    Raises:
        SetupError: It belongs to another checkout.
    """
    owner = owner_of(environment)
    if owner is not None and owner.resolve() != plan.PROJECT_ROOT.resolve():
        raise SetupError(
            f"the environment {environment} belongs to the checkout {owner}, whose programs would run this one from now"
            f" on: name another folder with VENV=..., or delete it; what needs no set-up runs in it by"
            f" VENV={environment} examples/setup/run_in_environment.sh COMMAND"
        )


@contextmanager
def locked(environment: Path) -> Iterator[None]:
    """Let one set-up of an environment run at a time.

    Args:
        environment: Folder of the virtual environment; the lock file lies beside it.

    Yields:
        Nothing.
    """
    environment.parent.mkdir(parents=True, exist_ok=True)
    with environment.with_name(environment.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_step(step: plan.Step, number: int, total: int) -> None:
    """Run one step with its output on the screen.

    Args:
        step: The step.
        number: Its number, from 1.
        total: Number of steps.

    Raises:
        SetupError: The command failed.
    """
    print(f"[{number}/{total}] {step.title} ...", flush=True)
    started = time.monotonic()
    status = subprocess.run(step.command, env=step_variables(), stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise SetupError(f"could not {step.title} (exit status {status}); {step.remedy}")
    print(f"[{number}/{total}] done in {time.monotonic() - started:.0f} s", flush=True)


def installation_steps(environment: Path, build: str, torch_index: str = "") -> tuple[plan.Step, ...]:
    """List what this machine has to install into an environment.

    Args:
        environment: Folder of the virtual environment.
        build: `cpu` or `cuda`.
        torch_index: Extra package index, or empty.

    Returns:
        The steps in order.
    """
    python = str(python_of(environment))
    return plan.installation_steps(build, python, str(plan.PROJECT_ROOT), platform.machine(), torch_index)


def creation_steps(environment: Path, build: str) -> tuple[plan.Step, ...]:
    """List what makes the empty environment.

    Args:
        environment: Folder of the virtual environment.
        build: `cpu` or `cuda`.

    Returns:
        One step, or none when a usable environment is there.
    """
    if has_working_pip(environment) and not plan.has_foreign_build(environment, build):
        return ()
    step = plan.Step(
        f"make the virtual environment {environment.name}",
        (sys.executable, "-m", "venv", "--clear", str(environment)),
        "on Debian and Ubuntu install the package python3-venv first",
    )
    return (step,)


def set_up(environment: Path, build: str, torch_index: str) -> bool:
    """Bring an environment into the state that is asked for.

    The stamp is removed before the first step and written after the last, so that an interrupted set-up
    is taken up again by the next call.

    Args:
        environment: Folder of the virtual environment.
        build: `cpu` or `cuda`.
        torch_index: Extra package index, or empty.

    Returns:
        True when something was installed, False when all of it was there.

    Raises:
        SetupError: A step failed, or the environment belongs to another checkout.
    """
    asked = installation_steps(environment, build)
    key = plan.environment_key(asked, platform.python_version(), plan.PROJECT_ROOT)
    if is_current(environment, key):
        return False
    with locked(environment):
        if is_current(environment, key):
            return False
        check_owner(environment)
        (environment / STAMP).unlink(missing_ok=True)
        steps = creation_steps(environment, build)
        steps += installation_steps(environment, build, torch_index)
        for number, step in enumerate(steps, start=1):
            run_step(step, number, len(steps))
        (environment / STAMP).write_text(key + "\n")
    return True


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments: Arguments without the program name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(description="Makes the project's virtual environment.")
    parser.add_argument("--venv", type=Path, default=plan.PROJECT_ROOT / ".venv", help="its folder")
    parser.add_argument(
        "--build",
        choices=("auto", *plan.BUILDS),
        default=os.environ.get("SIRIUS_BUILD", "auto"),
        help="vLLM build; auto takes cuda where an NVIDIA GPU answers (SIRIUS_BUILD)",
    )
    parser.add_argument(
        "--torch-index",
        default=os.environ.get("SIRIUS_TORCH_INDEX", ""),
        help="extra package index with the CPU build of torch (SIRIUS_TORCH_INDEX)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Carry out a parsed command.

    Args:
        options: Result of `parse_arguments`.

    Raises:
        SetupError: The environment could not be made.
    """
    check_python(sys.version_info[:3])
    environment = options.venv.absolute()
    build = plan.choose_build(options.build, options.build == "auto" and has_nvidia_gpu())
    started = time.monotonic()
    if not set_up(environment, build, options.torch_index):
        print(f"environment is ready: {options.venv} ({build} build of vLLM {plan.VLLM_VERSION})")
        return
    print(f"environment is ready after {time.monotonic() - started:.0f} s: {options.venv}")
    if missing := missing_compilers():
        print(
            f"warning: {' and '.join(missing)} not found; install a C++ compiler (Debian and Ubuntu:"
            " build-essential), because torch.compile and the fast CPU kernels build with it",
            file=sys.stderr,
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the tool.

    Args:
        arguments: Arguments without the program name; None takes those of the process.

    Returns:
        Exit status: 0, 1 after a failure, 130 after an interruption.
    """
    try:
        run(parse_arguments(arguments))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
