"""Installs runtime hooks into vLLM, all or none, and notices when vLLM has changed under them.

Knows nothing of Sirius. A hook replaces one function, method or property by a wrapper that calls the original, or one
constant of a module by another value.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sirius.errors import SiriusIntegrationError

_MARK = "__vllm_sirius_hook__"

_constants: dict[str, Any] = {}
"""Constants that hooks have put in place, by target; a constant cannot carry a mark."""


@dataclass(frozen=True)
class Hook:
    """One replaced symbol of vLLM.

    Attributes:
        target: ``"package.module:Owner.name"`` or ``"package.module:name"``.
        make: Takes the original (for a property its getter) and returns the wrapper, or the new value of a constant.
        fingerprint: `source_fingerprint` of the original in the supported vLLM version.
        why: What vLLM lacks without the hook.
        untouched: The condition under which the wrapper hands over to the original unchanged.
        remove_when: What would have to happen upstream for the hook to go.
        aliases: Modules that imported the symbol by value and must see the wrapper as well, if they are loaded.
    """

    target: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    fingerprint: str
    why: str
    untouched: str
    remove_when: str
    aliases: tuple[str, ...] = ()


def source_fingerprint(symbol: Any) -> str:
    """First 12 hex digits of the SHA-256 of a symbol's source, or of a constant's representation.

    Args:
        symbol: A function, class, method, property or constant.

    Returns:
        The digest.
    """
    function: Any = symbol.fget if isinstance(symbol, property) else symbol
    text = repr(symbol) if _is_constant(symbol) else inspect.getsource(function)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def resolve(target: str) -> tuple[Any, str, Any]:
    """Finds what a hook replaces.

    Args:
        target: As in `Hook.target`.

    Returns:
        The owner (module or class), the attribute's name and the attribute as it is stored there.

    Raises:
        SiriusIntegrationError: If vLLM has no such symbol.
    """
    module_name, _, path = target.partition(":")
    try:
        owner: Any = importlib.import_module(module_name)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        return owner, name, inspect.getattr_static(owner, name)
    except (ImportError, AttributeError) as error:
        raise SiriusIntegrationError(
            f"vLLM has no {target}: this release of vllm-sirius does not fit the installed vLLM; install the pair named in "
            "the README's compatibility table."
        ) from error


def is_installed(hook: Hook) -> bool:
    """Whether a hook's target already is the hook's wrapper."""
    stored = resolve(hook.target)[2]
    if _is_constant(stored):
        return hook.target in _constants and _constants[hook.target] is stored
    return getattr(_plain(stored), _MARK, None) == hook.target


def install(hooks: Sequence[Hook], check_fingerprints: bool = True) -> list[str]:
    """Installs hooks; nothing changes unless all of them can be installed. Repeating it is harmless.

    Args:
        hooks: The hooks, in order.
        check_fingerprints: Refuse a target whose source differs from the supported version.

    Returns:
        Targets that were installed now.

    Raises:
        SiriusIntegrationError: If a symbol is missing or has changed.
    """
    pending = [hook for hook in hooks if not is_installed(hook)]
    planned = []
    for hook in pending:
        owner, name, stored = resolve(hook.target)
        if check_fingerprints:
            _check_fingerprint(hook, stored)
        planned.append((hook, owner, name, stored))
    for hook, owner, name, stored in planned:
        wrapper = hook.make(_plain(stored))
        if _is_constant(stored):
            _constants[hook.target] = wrapper
        else:
            setattr(wrapper, _MARK, hook.target)
        setattr(owner, name, _dress(stored, wrapper))
        for alias in hook.aliases:
            module = sys.modules.get(alias)
            if module is not None and getattr(module, name, None) is stored:
                setattr(module, name, wrapper)
    return [hook.target for hook, *_ in planned]


def _check_fingerprint(hook: Hook, stored: Any) -> None:
    found = source_fingerprint(_plain(stored))
    if found != hook.fingerprint:
        raise SiriusIntegrationError(
            f"{hook.target} is not the one vllm-sirius was written for (source {found}, expected {hook.fingerprint}): another "
            "plugin may have replaced it, or vLLM was modified; install the pair named in the README's compatibility table."
        )


def _is_constant(stored: Any) -> bool:
    kinds = (property, staticmethod, classmethod)
    return not (isinstance(stored, kinds) or inspect.isroutine(stored) or inspect.isclass(stored))


def _plain(stored: Any) -> Callable[..., Any]:
    if isinstance(stored, property):
        assert stored.fget is not None
        return stored.fget
    if isinstance(stored, (staticmethod, classmethod)):
        function: Callable[..., Any] = stored.__func__
        return function
    plain: Callable[..., Any] = stored
    return plain


def _dress(stored: Any, wrapper: Callable[..., Any]) -> Any:
    if isinstance(stored, property):
        return property(wrapper)
    if isinstance(stored, (staticmethod, classmethod)):
        return type(stored)(wrapper)
    return wrapper
