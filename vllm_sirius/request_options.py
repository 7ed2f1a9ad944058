"""What one request may change: `SamplingParams.extra_args`, or ``vllm_xargs`` in the HTTP API. Leaf module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sirius.config import SiriusConfig
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


def parse_request_options(extra_args: Mapping[str, Any] | None, config: SiriusConfig) -> RequestOptions:
    """Reads the keys of Sirius out of a request's extra arguments; keys of others are left alone.

    Args:
        extra_args: `SamplingParams.extra_args` of the request. ``sirius`` switches drafting on or off for it
            (true/false, on/off, 1/0; the HTTP API carries strings and numbers only), ``sirius_threshold`` is its threshold.
        config: The engine's config, which gives the defaults.

    Returns:
        The options in force for the request.

    Raises:
        SiriusConfigError: On an unknown ``sirius*`` key, a bad value, or a threshold given to a lossless engine.
    """
    given = {key: value for key, value in (extra_args or {}).items() if key.startswith(ENABLED_KEY)}
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
        raise SiriusConfigError(f"{ENABLED_KEY}={value!r} is not a switch: use true or false.")
    return switch


def _parse_threshold(value: Any) -> float:
    text = (
        f"{THRESHOLD_KEY}={value!r} is not a finite number: give a likelihood such as 0.1, or more than 1 for lossless."
    )
    if isinstance(value, bool):
        raise SiriusConfigError(text)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise SiriusConfigError(text) from error
    if not math.isfinite(number):
        raise SiriusConfigError(text)
    return number
