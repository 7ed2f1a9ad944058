"""Per-request options are judged when the request arrives. Attaches to ``vllm.sampling_params``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_sirius.integration.hook_engine import Hook
from vllm_sirius.integration.speculative_config import sirius_config
from vllm_sirius.request_options import parse_request_options


def _verify(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(
        self: Any, model_config: Any, speculative_config: Any, structured_outputs_config: Any, tokenizer: Any
    ) -> None:
        original(self, model_config, speculative_config, structured_outputs_config, tokenizer)
        config = sirius_config(speculative_config)
        if config is not None:
            parse_request_options(self.extra_args, config)

    return wrapper


HOOKS = (
    Hook(
        target="vllm.sampling_params:SamplingParams.verify",
        make=_verify,
        fingerprint="ae287ee645ce",
        why="A bad per-request option must be an error to that client, not a failure inside the engine.",
        untouched="the speculative config is not Sirius's",
        remove_when="upstream offers a validator for extra_args",
    ),
)
