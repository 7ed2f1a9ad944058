"""Memory that the weights of an offloaded target may take. Reads ``vllm.config.CacheConfig``."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from vllm_sirius.offload.available import available_bytes
from vllm_sirius.offload.errors import OffloadError
from vllm_sirius.offload.plan import GB

logger = init_logger("vllm.sirius")

MARGIN_BYTES = 3 * GB // 2
"""For activations and, where the model is compiled, the compiler."""

KV_PART = 4
"""Where vLLM sizes the KV cache itself, by what loading has left, so much of the memory is left to it: one part in four."""


def weight_budget(vllm_config: Any, budget_gb: float | None) -> int:
    """The budget in bytes.

    Args:
        vllm_config: The engine's config.
        budget_gb: What the user gave, or ``None``.

    Raises:
        OffloadError: If nothing is left for weights.
    """
    if budget_gb is not None:
        return int(budget_gb * GB)
    available = available_bytes()
    kv_cache = vllm_config.cache_config.kv_cache_memory_bytes or available // KV_PART
    budget = int(available - kv_cache - MARGIN_BYTES)
    if budget <= 0:
        raise OffloadError(
            f"offload_budget_gb was not given, and of {available / GB:.2f} GB of memory that are left the KV cache takes "
            f"{kv_cache / GB:.2f} and a margin {MARGIN_BYTES / GB:.2f}: lower --kv-cache-memory-bytes, or free memory."
        )
    logger.info(
        "Sirius: offload_budget_gb=%.2f: %.2f GB of memory are left, less %.2f for the KV cache and %.2f as a margin",
        budget / GB,
        available / GB,
        kv_cache / GB,
        MARGIN_BYTES / GB,
    )
    return budget
