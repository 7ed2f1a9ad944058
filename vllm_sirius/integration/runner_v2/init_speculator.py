"""How Model Runner V2 comes to Sirius's speculator. Attaches to ``vllm.v1.worker.gpu.spec_decode``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_sirius.integration.hook_engine import Hook
from vllm_sirius.integration.speculative_config import sirius_config


def _init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if sirius_config(vllm_config.speculative_config) is None:
            return original(vllm_config, device, req_states)
        return make_speculator(vllm_config, device)

    return wrapper


def make_speculator(vllm_config: Any, device: Any) -> Any:
    """Builds the speculator of an engine with Sirius.

    Args:
        vllm_config: The engine's config.
        device: Where the model runs.

    Returns:
        The `SiriusSpeculator`.
    """
    # Imports the model runner's modules, which only a worker needs.
    from vllm_sirius.integration.runner_v2.speculator import SiriusSpeculator

    return SiriusSpeculator(vllm_config, device)


HOOKS = (
    Hook(
        target="vllm.v1.worker.gpu.spec_decode:init_speculator",
        make=_init_speculator,
        fingerprint="e86cedd1d4c3",
        why="Model Runner V2 builds its speculator from a closed list of methods.",
        untouched="the speculative config is not Sirius's",
        remove_when="upstream looks speculators up in a registry",
        aliases=("vllm.v1.worker.gpu.model_runner",),
    ),
)
