"""What one request may do on either model runner: its own options, where its drafts end and how long they may be. Leaf module.

Options come by `SamplingParams.extra_args`, or ``vllm_xargs`` in the HTTP API.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sirius.config import SiriusConfig, fits_float32
from vllm_sirius.errors import SiriusConfigError

ENABLED_KEY = "sirius"
THRESHOLD_KEY = "sirius_threshold"
_SWITCH = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


@dataclass(frozen=True)
class RequestOptions:
    """The effective options of one request.

    Attributes:
        enabled: Whether tokens are drafted for the request; if not, it decodes exactly as without Sirius.
        threshold: Likelihood threshold of the request; ignored by a lossless engine.
    """

    enabled: bool
    threshold: float


@dataclass(frozen=True)
class RequestRules:
    """What may be drafted for one request.

    Attributes:
        enabled: Whether to draft for it at all.
        threshold: Its likelihood threshold; ignored by a lossless engine.
        end_token_ids: Tokens that end its text. The draft never proposes one: only the target ends a text.
        num_prompt_tokens: Length of its prompt.
        max_tokens: Most tokens it may emit, or ``None``.
        min_tokens: Tokens it must emit before it may end.
    """

    enabled: bool
    threshold: float
    end_token_ids: frozenset[int]
    num_prompt_tokens: int
    max_tokens: int | None
    min_tokens: int

    @classmethod
    def read(cls, sampling_params: Any, num_prompt_tokens: int, config: SiriusConfig) -> RequestRules:
        """Reads the rules out of a request's sampling parameters.

        Args:
            sampling_params: vLLM's `SamplingParams`, judged when the request arrived.
            num_prompt_tokens: Length of its prompt.
            config: The engine's config.

        Returns:
            The rules.
        """
        options = parse_request_options(sampling_params.extra_args, config)
        ends: set[int] = set(sampling_params.stop_token_ids or ())
        if sampling_params.eos_token_id is not None:  # None where the request ignores the end of text
            ends.add(sampling_params.eos_token_id)
        return cls(
            enabled=options.enabled,
            threshold=options.threshold,
            end_token_ids=frozenset(ends),
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=sampling_params.max_tokens,
            min_tokens=sampling_params.min_tokens,
        )

    def last_position(self, max_model_len: int) -> int:
        """Last position at which a draft token may stand; -1 where the request does not draft.

        Every verification pass emits a token of the target's own after the accepted ones, so the last token that a request
        may still emit is never drafted, nor one at the last position, which the scheduler does not verify.

        Args:
            max_model_len: Longest text of the engine.
        """
        if not self.enabled:
            return -1
        longest = max_model_len
        if self.max_tokens is not None:
            longest = min(longest, self.num_prompt_tokens + self.max_tokens)
        return longest - 2

    def most_draft_tokens(self, num_tokens: int, num_speculative_tokens: int, max_model_len: int) -> int:
        """Draft tokens that can still become part of the text.

        Args:
            num_tokens: Length of the text.
            num_speculative_tokens: ``kernel_size - 1``.
            max_model_len: Longest text of the engine.

        Returns:
            The limit, zero or more.
        """
        most = min(num_speculative_tokens, self.last_position(max_model_len) - (num_tokens - 1))
        num_emitted = num_tokens - self.num_prompt_tokens
        if num_emitted < self.min_tokens:
            # Upstream rules the end of the text out for the token after a draft by the length before the draft.
            most = min(most, self.min_tokens - num_emitted - 1)
        return max(0, most)


def parse_request_options(extra_args: Mapping[str, Any] | None, config: SiriusConfig) -> RequestOptions:
    """Reads the keys of Sirius out of a request's extra arguments; keys of others are left alone.

    Args:
        extra_args: `SamplingParams.extra_args` of the request. ``sirius`` switches drafting on or off for it
            (on/off, true/false, 1/0; the HTTP API carries strings and numbers only), ``sirius_threshold`` is its threshold.
        config: The engine's config, which gives the defaults.

    Returns:
        The options in force for the request.

    Raises:
        SiriusConfigError: On an unknown ``sirius*`` key, a bad value, or a threshold given to a lossless engine.
    """
    given = {key: value for key, value in (extra_args or {}).items() if str(key).startswith(ENABLED_KEY)}
    unknown = sorted(set(given) - {ENABLED_KEY, THRESHOLD_KEY})
    if unknown:
        raise SiriusConfigError(
            f"{unknown[0]!r} is not a request option of Sirius: the options are {ENABLED_KEY!r} (on or off) and "
            f"{THRESHOLD_KEY!r}."
        )
    enabled = _parse_switch(given[ENABLED_KEY]) if ENABLED_KEY in given else True
    threshold = config.threshold
    if THRESHOLD_KEY in given:
        if config.lossless:
            raise SiriusConfigError(
                f"{THRESHOLD_KEY}={given[THRESHOLD_KEY]!r} was given, but this engine runs with acceptance='lossless': "
                "drop the option, or start the engine with acceptance='threshold'."
            )
        threshold = _parse_threshold(given[THRESHOLD_KEY])
    return RequestOptions(enabled, threshold)


def _parse_switch(value: Any) -> bool:
    switch = _SWITCH.get(str(value).lower())
    if switch is None:
        raise SiriusConfigError(f"{ENABLED_KEY}={value!r} is not a switch: use on or off.")
    return switch


def _parse_threshold(value: Any) -> float:
    """A number, or the text of one: clients of the HTTP API send both."""
    if isinstance(value, bool) or (type(value) is int and value in (0, 1)):
        # vLLM's HTTP API hands `true` and `false` over as 1 and 0, and 0 accepts every draft.
        raise SiriusConfigError(
            f"{THRESHOLD_KEY}={value!r} may be true or false, which is no threshold: write the number as 0.0 or 1.0."
        )
    number = _number(value)
    if number is None or not fits_float32(number):
        raise SiriusConfigError(
            f"{THRESHOLD_KEY}={value!r} is not a finite number of single precision (up to 3.4e38): give a likelihood such "
            "as 0.1, or more than 1 for lossless."
        )
    return number


def _number(value: Any) -> float | None:
    if not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
