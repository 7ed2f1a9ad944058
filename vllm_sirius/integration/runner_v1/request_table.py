"""What Sirius keeps per running request on Model Runner V1, keyed by request id (rows move between steps)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_sirius.config import SiriusConfig
from vllm_sirius.pacing.confidence import RequestAcceptance
from vllm_sirius.request_options import parse_request_options


@dataclass
class SiriusRequest:
    """State of one request.

    Attributes:
        enabled: Whether to draft for it.
        threshold: Its likelihood threshold.
        greedy: Whether it decodes greedily.
        end_token_ids: Tokens the draft never proposes; empty where the request ignores the end of text.
        max_tokens: Most tokens it may emit, or ``None``.
        min_tokens: Tokens it must emit before it may end.
        acceptance: How its drafts fare, or ``None`` where lengths do not adapt.
        slot: Its row in the neuron statistics, or ``None``.
        num_prompt_tokens: Length of its prompt.
        num_known_tokens: Tokens known when it (re)started: below this position a forward pass is prefill.
        num_drafted: Draft tokens that the running pass judges.
    """

    enabled: bool
    threshold: float
    greedy: bool
    end_token_ids: frozenset[int]
    max_tokens: int | None
    min_tokens: int
    acceptance: RequestAcceptance | None
    slot: int | None
    num_prompt_tokens: int
    num_known_tokens: int
    num_drafted: int = 0


def make_request(
    sampling_params: Any,
    config: SiriusConfig,
    num_prompt_tokens: int,
    slot: int | None,
    acceptance: RequestAcceptance | None,
) -> SiriusRequest:
    """Reads what matters out of a request's sampling parameters.

    Args:
        sampling_params: vLLM's `SamplingParams`, judged when the request arrived.
        config: The engine's options.
        num_prompt_tokens: Length of its prompt.
        slot: Its row in the neuron statistics, or ``None``.
        acceptance: As in `SiriusRequest`.

    Returns:
        The state.
    """
    options = parse_request_options(sampling_params.extra_args, config)
    ends: set[int] = set(sampling_params.stop_token_ids or ())
    if sampling_params.eos_token_id is not None:  # None where the request ignores the end of text
        ends.add(sampling_params.eos_token_id)
    return SiriusRequest(
        enabled=options.enabled,
        threshold=options.threshold,
        greedy=sampling_params.temperature == 0.0,
        end_token_ids=frozenset(ends),
        max_tokens=sampling_params.max_tokens,
        min_tokens=sampling_params.min_tokens,
        acceptance=acceptance,
        slot=slot,
        num_prompt_tokens=num_prompt_tokens,
        num_known_tokens=num_prompt_tokens,
    )
