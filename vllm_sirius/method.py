"""The name of the speculative method, and whether an engine is asked for it. Leaf module, loaded whatever vLLM is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHOD = "sirius"


def asks_for_sirius(engine_args: Any) -> bool:
    """Whether the arguments of an engine name the method; never raises, however odd they are.

    Args:
        engine_args: vLLM's ``EngineArgs``.
    """
    options = getattr(engine_args, "speculative_config", None)
    named = [options.get("method"), options.get("model")] if isinstance(options, Mapping) else []
    named += [getattr(engine_args, "spec_method", None), getattr(engine_args, "spec_model", None)]
    return any(isinstance(value, str) and value == METHOD for value in named)
