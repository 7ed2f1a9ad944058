"""Async scheduling stays on with Sirius. Attaches to ``vllm.config.vllm``."""

from __future__ import annotations

from typing import Any, Literal, get_args

from vllm_sirius.integration.hook_engine import Hook
from vllm_sirius.integration.speculative_config import METHOD


def _with_sirius(methods: Any) -> Any:
    return Literal[*get_args(methods), METHOD]


HOOKS = (
    Hook(
        target="vllm.config.vllm:EagleModelTypes",
        make=_with_sirius,
        fingerprint="a146d6f80071",
        why="Async scheduling is switched off for speculative methods that are not in a closed list; Sirius's drafts stay on "
        "the device, as EAGLE's do.",
        untouched="always: the list, which is read for async scheduling alone, only gains one name",
        remove_when="upstream asks the speculative config whether its drafter works with async scheduling",
    ),
)
