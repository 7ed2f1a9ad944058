"""The only list of runtime hooks. `patches/README.md` is its ledger."""

from __future__ import annotations

from vllm_sirius.integration import async_scheduling, engine_args, lookahead, sampling_params
from vllm_sirius.integration.hook_engine import Hook
from vllm_sirius.integration.runner_v2 import init_speculator

HOOKS: tuple[Hook, ...] = (
    *engine_args.HOOKS,
    *lookahead.HOOKS,
    *async_scheduling.HOOKS,
    *sampling_params.HOOKS,
    *init_speculator.HOOKS,
)
"""Installed in every process that loads the plugin."""


def worker_hooks() -> tuple[Hook, ...]:
    """Hooks on modules that only a worker on Model Runner V1 loads; Sirius's worker installs them, so no other has them."""
    from vllm_sirius.integration.runner_v1 import rejection_sample

    return rejection_sample.HOOKS
