"""What is known of an arm before and after its engine starts: bytes of a step, bytes of memory."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from benchmarks.configurations import Configuration
from benchmarks.errors import BenchmarkError
from vllm_sirius.config import SiriusConfig
from vllm_sirius.errors import SiriusError
from vllm_sirius.measuring import memory
from vllm_sirius.measuring.inspection import Inspection, inspect

EXTRA_MEMORY = re.compile(r"extra memory ([\d.]+) MiB")
"""In the start-up line of Sirius."""

SCALES_SHARE = 1 / 8
"""Most that scales and offsets add to low-bit copies."""


@functools.cache
def inspected(model: str, options: str, dtype: str) -> Inspection:
    """Looks at a model, once for each draft.

    Args:
        model: Path or hub name.
        options: Options of Sirius as JSON.
        dtype: Type of the weights.

    Returns:
        What was found.

    Raises:
        BenchmarkError: If Sirius cannot serve the model here.
    """
    try:
        return inspect(model, json.loads(options), dtype)
    except SiriusError as error:
        raise BenchmarkError(f"--model {model}: {error}") from error


def draft_options(config: SiriusConfig | None) -> str:
    """The options that decide what a draft step reads.

    Args:
        config: The options of an arm; ``None`` for an arm without Sirius.

    Returns:
        JSON for `inspected`, the same for arms with the same draft.
    """
    if config is None:
        return "{}"
    options: dict[str, Any] = {"sparsity": config.sparsity, "draft_weights": config.draft_weights}
    if config.sparsity in ("coarse", "fine"):
        options["density"] = config.density
    if config.draft_weights != "shared":
        options["draft_weights_scope"] = config.draft_weights_scope
    return json.dumps(options)


def copied_bytes(config: SiriusConfig, step_bytes: int, ffn_share: float) -> int:
    """Estimates the weights that the draft of Sirius keeps for itself on a CPU.

    Args:
        config: The options; ``auto`` is what it is on CPU.
        step_bytes: Weight bytes of a decoding step.
        ffn_share: Part of them that belongs to FFNs.

    Returns:
        Bytes of neuron rows, or of low-bit copies.
    """
    bits = config.resolved(copies=True).draft_bits
    if bits is None:
        return int(step_bytes * ffn_share)
    copied = 1.0 if config.draft_weights_scope == "all" else ffn_share
    return int(step_bytes * copied * bits / 16 * (1 + SCALES_SHARE))


def extra_bytes(configuration: Configuration, inspection: Inspection) -> int:
    """Estimates what an arm's engine holds beside model and KV cache.

    Args:
        configuration: The arm.
        inspection: What is known of the model.

    Returns:
        Bytes of copies, or of a draft model.
    """
    if configuration.sirius is not None:
        return copied_bytes(configuration.sirius, inspection.step_bytes, inspection.ffn_share)
    return memory.weight_file_bytes(str(configuration.speculative_config.get("model", "")))


def draft_density(configuration: Configuration, model: str, dtype: str, step_bytes: int) -> float | None:
    """Part of a target step's bytes that a draft step of an arm reads.

    Args:
        configuration: The arm.
        model: Path or hub name of the target.
        dtype: Type of its weights.
        step_bytes: Weight bytes of a target step.

    Returns:
        The part: 0 for methods that draft without weights, ``None`` where it is unknown.
    """
    if configuration.sirius is not None:
        return inspected(model, draft_options(configuration.sirius), dtype).draft_density
    drafter = configuration.speculative_config.get("model")
    if drafter is None:
        return 0.0
    return memory.weight_file_bytes(str(drafter)) / step_bytes or None


def extra_memory_bytes(configuration: Configuration, start_up_line: str) -> int | None:
    """Memory that an arm takes beyond vLLM alone.

    Args:
        configuration: The arm.
        start_up_line: What Sirius said when the engine started.

    Returns:
        What Sirius reports, or the weight files of a draft model; ``None`` where it is unknown.
    """
    if configuration.sirius is not None:
        found = EXTRA_MEMORY.search(start_up_line)
        return int(float(found.group(1)) * (1 << 20)) if found else None
    drafter = configuration.speculative_config.get("model")
    return 0 if drafter is None else memory.weight_file_bytes(str(drafter)) or None
