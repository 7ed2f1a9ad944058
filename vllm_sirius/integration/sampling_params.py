"""Per-request options are judged when the request arrives. Attaches to ``vllm.sampling_params``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_sirius.errors import SiriusConfigError
from vllm_sirius.integration.hook_engine import Hook
from vllm_sirius.integration.speculative_config import sirius_config
from vllm_sirius.request_rules import parse_request_options


def _verify(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(
        self: Any, model_config: Any, speculative_config: Any, structured_outputs_config: Any, tokenizer: Any
    ) -> None:
        original(self, model_config, speculative_config, structured_outputs_config, tokenizer)
        if sirius_config(speculative_config) is not None:
            check_sampling_params(self, speculative_config)

    return wrapper


def check_sampling_params(params: Any, speculative_config: Any) -> None:
    """Judges the options of a request to an engine with Sirius.

    Args:
        params: Its `SamplingParams`.
        speculative_config: The engine's speculative config.

    Raises:
        VLLMValidationError: If an option is bad; the HTTP server answers 400 to vLLM's own validation errors alone.
    """
    config = sirius_config(speculative_config)
    assert config is not None
    try:
        parse_request_options(params.extra_args, config)
    except SiriusConfigError as error:
        raise VLLMValidationError(str(error), parameter="extra_args") from error
    if params.logprob_token_ids:
        # vLLM looks these tokens up for the plain sampler alone. Switching Sirius off for the request does not help: where
        # a neighbour in the batch has drafts, all rows go through the rejection sampler.
        raise VLLMValidationError(
            f"logprob_token_ids={params.logprob_token_ids!r}: vLLM returns no log probabilities of given tokens where it "
            "verifies drafts. Drop the option and ask for logprobs=N, the N likeliest tokens, or send the request to an "
            "engine without Sirius.",
            parameter="logprob_token_ids",
        )


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
