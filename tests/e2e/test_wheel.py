"""The installed wheel in an environment as pip leaves it: `vllm-sirius doctor` finds what is wrong and repairs it."""

from __future__ import annotations

import pytest
from support.real_models import SMOL, model_path
from support.wheel_environment import WheelEnvironment

BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')\n"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    made = WheelEnvironment(tmp_path_factory.mktemp("wheel"))
    made.add_package("torchvision", BROKEN)
    made.add_package("torchaudio", "")
    return made


def states(report):
    return {finding["part"]: finding["state"] for finding in report["findings"]}


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

    status, report, said = environment.doctor("--fix")
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
    status, report, said = environment.doctor(model_path(SMOL))
    assert status == 0, said
    assert report["supported"]
