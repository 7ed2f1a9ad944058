"""KV slots for the draft. Attaches to ``vllm.config.vllm``.

The draft writes K/V up to ``kernel_size - 1`` positions past the text. If the scheduler did not reserve them, the draft
would write into blocks of other requests, in silence: this is the hook that must never be missing, and the worker
asserts that it is in force.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.integration.hook_engine import Hook
from vllm_sirius.integration.speculative_config import sirius_config


def _num_lookahead_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: Any) -> int:
        if sirius_config(self.speculative_config) is None:
            reserved: int = original(self)
            return reserved
        return num_lookahead_tokens(self.speculative_config)

    return wrapper


def num_lookahead_tokens(speculative_config: Any) -> int:
    """KV slots that the draft writes past the text.

    Args:
        speculative_config: A speculative config of Sirius.

    Returns:
        Their number.
    """
    config = sirius_config(speculative_config)
    assert config is not None
    return config.num_speculative_tokens


def assert_lookahead_reserved(vllm_config: Any) -> None:
    """Refuses to run a worker whose scheduler would not reserve the draft's slots.

    Args:
        vllm_config: The engine's config.

    Raises:
        SiriusIntegrationError: If the reservation is missing.
    """
    config = sirius_config(vllm_config.speculative_config)
    assert config is not None
    if vllm_config.num_lookahead_tokens < config.num_speculative_tokens:
        raise SiriusIntegrationError(
            f"vLLM reserves {vllm_config.num_lookahead_tokens} lookahead slots, Sirius writes "
            f"{config.num_speculative_tokens}: the plugin does not decide VllmConfig.num_lookahead_tokens in this process; "
            "check that VLLM_PLUGINS does not leave out 'sirius'."
        )


HOOKS = (
    Hook(
        target="vllm.config.vllm:VllmConfig.num_lookahead_tokens",
        make=_num_lookahead_tokens,
        fingerprint="eaad2c3b58b4",
        why="The scheduler reserves KV slots past the scheduled tokens only for the drafters it knows.",
        untouched="the speculative config is not Sirius's",
        remove_when="upstream asks the speculative config how many lookahead slots its drafter writes",
    ),
)
