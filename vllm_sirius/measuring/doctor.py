"""Asks `vllm-sirius doctor` about a model, in a process of its own, which keeps vLLM's imports out of the asking one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from vllm_sirius.measuring.child import child_environment, python_command


class DoctorError(Exception):
    """The model cannot be served; the text is the reason."""


def ask_doctor(model: str, options: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Asks about a model.

    Args:
        model: Path or hub name.
        options: Options of Sirius.
        dtype: Type of the weights, as for ``--dtype``.

    Returns:
        What ``vllm-sirius doctor --json`` says.

    Raises:
        DoctorError: If Sirius cannot serve the model here.
    """
    command = python_command("vllm_sirius.cli", "doctor", model, "--json", "--dtype", dtype)
    variables = child_environment(VLLM_LOGGING_STREAM="ext://sys.stderr", VLLM_LOGGING_LEVEL="ERROR")
    found = subprocess.run(
        [*command, "--speculative-config", json.dumps(options)],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != 0:
        lines = found.stderr.strip().splitlines() or ["vllm-sirius doctor failed"]
        raise DoctorError(lines[-1])
    report: dict[str, Any] = json.loads(found.stdout)
    return report
