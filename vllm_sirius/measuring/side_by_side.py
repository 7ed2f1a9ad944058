"""What programs share that measure engines side by side: how the engines are sized, and the pause between their turns."""

from __future__ import annotations

from typing import Any

PAUSE_SECONDS = 0.3
"""Between two engines' turns: OpenMP threads of the one that ran last keep cores busy for up to 0.2 s."""

POSITIONS = 128
"""The longest text of an engine is a multiple of this, vLLM's block size on CPU."""

WARM_UP_TOKENS = 32
"""An engine's first answer, which is not measured."""


def rounded_length(longest: int) -> int:
    """The longest text of an engine that texts of at most `longest` tokens need."""
    return -(-longest // POSITIONS) * POSITIONS


def engine_options(
    model: str, dtype: str, max_model_len: int, max_num_seqs: int, kv_cache_memory_bytes: int, **more: Any
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine that is measured.

    Args:
        model: Path or hub name.
        dtype: Type of the weights.
        max_model_len: Longest text.
        max_num_seqs: Largest batch.
        kv_cache_memory_bytes: Size of the KV cache.
        **more: Further arguments.
    """
    return {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        # The same prompts come back: out of the cache they would be neither observed nor timed.
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        **more,
    }
