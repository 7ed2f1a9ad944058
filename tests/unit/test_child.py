"""Python that the project starts takes no modules from the current folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import environment
import pytest
from support.real_models import ROOT

import vllm_sirius
from benchmarks import commands
from vllm_sirius.errors import SiriusError
from vllm_sirius.measuring.inspection import inspect

POISON = "raise SystemExit('the wrong ' + __name__)\n"
PROBE = """
import json, subprocess, sys, vllm_sirius
program = "import json; print(json.__file__)"
print(vllm_sirius.__file__, json.__file__, *sys.argv[1:], flush=True)
subprocess.run([sys.executable, "-c", program], check=True)
"""
START = """
import pathlib, subprocess, sys
sys.path.insert(0, sys.argv[1])
from vllm_sirius.measuring import child
checkout = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else None
command = child.python_command("vllm_sirius.probe", "one", "two", checkout=checkout)
sys.exit(subprocess.run(command, env=child.child_environment()).returncode)
"""


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with files that are called like modules that children import."""
    for name in ("json", "runpy", "pip", "vllm_sirius"):
        (tmp_path / f"{name}.py").write_text(POISON)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("asked_for", [False, True], ids=["this-package", "another-checkout"])
def test_children_take_one_package_installed_or_not_and_nothing_beside_it(poisoned: Path, asked_for: bool) -> None:
    package = poisoned / "checkout" / "vllm_sirius"
    (package / "measuring").mkdir(parents=True)
    for name in ("__init__.py", "version.py", "measuring/__init__.py", "measuring/child.py"):
        (package / name).write_text((Path(vllm_sirius.__file__).parent / name).read_text())
    (package / "probe.py").write_text(PROBE)
    (package.parent / "json.py").write_text(POISON)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", START, *([str(ROOT)] if asked_for else []), str(package.parent)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    child, grandchild = done.stdout.splitlines()
    assert child == f"{package / '__init__.py'} {json.__file__} one two"
    assert grandchild == json.__file__


def test_a_model_is_inspected_in_any_folder(poisoned: Path) -> None:
    """Options and names are judged here, models in a process of their own, which takes nothing from the folder."""
    with pytest.raises(SiriusError, match="density=7"):
        inspect("no/such/model", {"density": 7})
    with pytest.raises(SiriusError, match=f"{poisoned} is a folder without a config.json"):
        inspect(str(poisoned))
    with pytest.raises(SiriusError, match="does not exist"):
        inspect(str(poisoned / "nowhere"))
    (poisoned / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(SiriusError, match="model type `nonsense`"):
        inspect(str(poisoned))


def test_commands_of_vllm_and_of_the_set_up_keep_out_of_the_current_folder(poisoned: Path) -> None:
    for variables in (commands.environment(), environment.step_variables()):
        subprocess.run([sys.executable, "-c", "import json"], env=variables, check=True)
    assert environment.has_working_pip(Path(sys.prefix))


def test_no_program_of_the_project_starts_python_without_a_care() -> None:
    """Steps of the set-up say it by a variable, see above: their commands are the key of an environment."""
    careless = re.compile(r"\[\s*sys\.executable,(?!\s*\"-P\")")
    files = [file for folder in ("vllm_sirius", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [str(file) for file in files if careless.search(file.read_text())] == []
