"""Exceptions that users of the plugin see. Leaf module."""

from __future__ import annotations

from typing import Any


class SiriusError(ValueError):
    """Base of every error the plugin raises on purpose."""


class SiriusConfigError(SiriusError):
    """An option has a bad value, is unknown, or contradicts another one."""


class SiriusUnsupportedError(SiriusError):
    """The model or the engine set-up cannot be served with Sirius."""


class ModelError(SiriusError):
    """vLLM itself cannot serve the model; the text has its reason in one line."""


class SiriusIntegrationError(SiriusError):
    """The installed vLLM does not look like the one the plugin was written for."""


def one_line(error: BaseException) -> str:
    """The reason that an exception of another library gives.

    Args:
        error: The exception; pydantic's have several lines, of which one is the reason.

    Returns:
        One line.
    """
    details = getattr(error, "errors", None)
    if callable(details):
        return "; ".join(_detail(detail) for detail in details())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A missing key or attribute means nothing without the kind of the error.
    return lines[0] if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {lines[0]}"


def _detail(detail: dict[str, Any]) -> str:
    reason = (
        " ".join(str(detail.get("msg", "")).split()).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    )
    place = ".".join(str(part) for part in detail.get("loc", ()))
    return reason if not place or detail.get("type") == "value_error" else f"{place}: {reason}"
