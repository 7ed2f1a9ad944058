"""The only list of runtime hooks. `patches/README.md` is its ledger."""

from __future__ import annotations

from vllm_sirius.integration import engine_args, lookahead, sampling_params
from vllm_sirius.integration.hook_engine import Hook

HOOKS: tuple[Hook, ...] = (*engine_args.HOOKS, *lookahead.HOOKS, *sampling_params.HOOKS)
"""Installed in every process that loads the plugin."""


def worker_hooks() -> tuple[Hook, ...]:
    """Hooks on modules that only a worker loads; Sirius's worker installs them, so no other worker has them."""
    from vllm_sirius.integration.runner_v1 import rejection_sample

    return rejection_sample.HOOKS
