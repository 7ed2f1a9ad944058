"""Looks at the model and the machine before any engine starts: `inspect`, and this module as a program does the looking.

A process of its own keeps vLLM's imports, environment variables and distributed state out of the one that measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from vllm_sirius.errors import ModelError, SiriusError, SiriusUnsupportedError
from vllm_sirius.measuring.child import child_environment, python_command
from vllm_sirius.tuning.options import TuningOptions


@dataclass(frozen=True)
class Inspection:
    """What is known before engines start.

    Attributes:
        platform: vLLM's name of the platform, for example ``cpu``.
        dtype: The dtype that ``auto`` stands for.
        no_low_bit: Why quantised copies cannot be drafted with; empty where they can.
        max_model_len: Longest text of the model.
        kv_bytes_per_token: KV cache of one token of text, in bytes; an upper bound for models with sliding windows.
        step_bytes: Weight bytes that a dense decoding step reads.
        ffn_share: Part of them that belongs to gated FFNs.
    """

    platform: str
    dtype: str
    no_low_bit: str
    max_model_len: int
    kv_bytes_per_token: int
    step_bytes: int
    ffn_share: float


def inspect(options: TuningOptions) -> Inspection:
    """Looks at a model without loading its weights.

    Args:
        options: What the user asked for.

    Returns:
        What was found.

    Raises:
        SiriusUnsupportedError: If Sirius cannot serve the model here, in the words of ``vllm serve``.
        ModelError: If vLLM cannot.
    """
    engine = {"model": options.model, "dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    variables = child_environment(VLLM_LOGGING_STREAM="ext://sys.stderr", VLLM_LOGGING_LEVEL="ERROR")
    command = python_command(__name__, json.dumps(engine))
    found = subprocess.run(
        command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        lines = [line.strip() for line in found.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"looking at it ended with exit status {found.returncode}"
        raise ModelError(f"vLLM cannot serve {options.model}: {reason}")
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    if "refused" in answer:
        raise SiriusUnsupportedError(answer["refused"])
    if "failed" in answer:
        raise ModelError(answer["failed"])
    return Inspection(**answer)


def _answer() -> None:
    """Prints one line of JSON after whatever else was printed."""
    from vllm_sirius.integration.inspection import describe_engine

    try:
        answer = describe_engine(json.loads(sys.argv[1]))
    except ModelError as error:
        answer = {"failed": str(error)}
    except SiriusError as error:
        answer = {"refused": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    _answer()
