"""Looks at a model and the machine before any engine starts: `inspect`, and this module as a program does the looking.

A process of its own keeps vLLM's imports, environment variables and distributed state out of the one that measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sirius.config import SiriusConfig
from vllm_sirius.environment.doctor import require_vllm
from vllm_sirius.errors import ModelError, SiriusError, SiriusUnsupportedError
from vllm_sirius.measuring.child import child_environment, python_command
from vllm_sirius.measuring.model_name import check_model_name


@dataclass(frozen=True)
class Inspection:
    """What is known before engines start.

    Attributes:
        platform: vLLM's name of the platform, for example ``cpu``.
        dtype: The dtype that ``auto`` stands for.
        no_low_bit: Why quantised copies cannot be drafted with; empty where they can.
        max_model_len: Longest text of the model.
        kv_bytes_per_token: KV cache of one token of text, in bytes; an upper bound for models with sliding windows.
        gated_ffns: Number of FFNs that drafts thin out or copy.
        neurons: Neurons of the first of them.
        step_bytes: Weight bytes that a dense decoding step reads.
        ffn_share: Part of them that belongs to gated FFNs.
        draft_density: Part of them that a draft step reads.
        copied_bytes: Weights that the draft keeps for itself.
    """

    platform: str
    dtype: str
    no_low_bit: str
    max_model_len: int
    kv_bytes_per_token: int
    gated_ffns: int
    neurons: int
    step_bytes: int
    ffn_share: float
    draft_density: float
    copied_bytes: int


def inspect(
    model: str, options: Mapping[str, Any] | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> Inspection:
    """Looks at a model without loading its weights.

    Args:
        model: Path or hub name.
        options: Options of Sirius; none for the defaults.
        dtype: Type of the weights, as for ``--dtype``.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        What was found.

    Raises:
        SiriusUnsupportedError: If Sirius cannot serve the model here, in the words of ``vllm serve``.
        SiriusConfigError: If an option is bad.
        ModelError: If vLLM cannot, is missing, or there is no such model.
    """
    # Before anything slow, and in words that name what was given.
    SiriusConfig.from_options(dict(options or {}))
    check_model_name(model)
    require_vllm()
    question = {
        "model": model,
        "options": dict(options or {}),
        "engine_options": {"dtype": dtype, "trust_remote_code": trust_remote_code},
    }
    variables = child_environment(VLLM_LOGGING_STREAM="ext://sys.stderr", VLLM_LOGGING_LEVEL="ERROR")
    found = subprocess.run(
        python_command(__name__, json.dumps(question)),
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != 0:
        lines = [line.strip() for line in found.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"looking at it ended with exit status {found.returncode}"
        raise ModelError(f"vLLM cannot serve {model}: {reason}")
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    if "refused" in answer:
        raise SiriusUnsupportedError(answer["refused"])
    if "failed" in answer:
        raise ModelError(answer["failed"])
    return Inspection(**answer)


def _answer() -> None:
    """Prints one line of JSON after whatever else was printed."""
    from vllm_sirius.integration.inspection import describe_model

    try:
        answer = describe_model(**json.loads(sys.argv[1]))
    except ModelError as error:
        answer = {"failed": str(error)}
    except SiriusError as error:
        answer = {"refused": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    _answer()
