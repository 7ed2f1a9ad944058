"""Installs runtime hooks into vLLM, all or none, and notices when vLLM has changed under them.

Knows nothing of Sirius. A hook replaces one function, method or property by a wrapper that calls the original, or one
constant of a module by another value.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
        symbol: A function, its code object, a class, method, property or constant. Of a function that wraps another one
            (`functools.wraps`) the source of the wrapped one counts, of a code object always its own.

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
            "the README, under 'Compatibility and limits'."
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
        SiriusIntegrationError: If a symbol is missing, has changed or was replaced by somebody else.
    """
    planned = []
    for hook in hooks:
        if is_installed(hook):
            continue
        owner, name, stored = resolve(hook.target)
        if check_fingerprints:
            _check_upstream(hook, stored)
        planned.append(_Replacement(hook, owner, name, stored, hook.make(_plain(stored))))
    done: list[_Replacement] = []
    try:
        for replacement in planned:
            replacement.put_in()
            done.append(replacement)
    except BaseException:
        for replacement in reversed(done):
            replacement.take_out()
        raise
    return [replacement.hook.target for replacement in planned]


@dataclass(frozen=True)
class _Replacement:
    """What one hook puts in place of what."""

    hook: Hook
    owner: Any
    name: str
    stored: Any
    wrapper: Any

    def put_in(self) -> None:
        if _is_constant(self.stored):
            _constants[self.hook.target] = self.wrapper
        else:
            setattr(self.wrapper, _MARK, self.hook.target)
        setattr(self.owner, self.name, _dress(self.stored, self.wrapper))
        self._replace_in_aliases(self.stored, self.wrapper)

    def take_out(self) -> None:
        _constants.pop(self.hook.target, None)
        setattr(self.owner, self.name, self.stored)
        self._replace_in_aliases(self.wrapper, self.stored)

    def _replace_in_aliases(self, before: Any, after: Any) -> None:
        for alias in self.hook.aliases:
            module = sys.modules.get(alias)
            if module is not None and getattr(module, self.name, None) is before:
                setattr(module, self.name, after)


def _check_upstream(hook: Hook, stored: Any) -> None:
    """Refuses what is not the symbol that vLLM's own file defines, or not in the supported version.

    A wrapper made with `functools.wraps` carries the name, the module and, for `inspect`, even the source of what it wraps.
    So the code object that would run is asked where it comes from.
    """
    function = _plain(stored)
    code = getattr(function, "__code__", None)
    file = getattr(sys.modules[hook.target.partition(":")[0]], "__file__", None)
    if isinstance(code, types.CodeType) and not _is_same_file(code.co_filename, file):
        raise SiriusIntegrationError(_replaced(hook, function))
    try:
        found = source_fingerprint(code if isinstance(code, types.CodeType) else function)
    except Exception as error:
        if not isinstance(code, types.CodeType):
            raise SiriusIntegrationError(_replaced(hook, function)) from error
        raise SiriusIntegrationError(
            f"the source of {hook.target} in {file} cannot be read ({type(error).__name__}: {error}), so nothing shows that "
            "it is the one vllm-sirius was written for: install a vLLM that has its source files."
        ) from error
    if found == hook.fingerprint:
        return
    if code is None and callable(function) and type(function).__module__ != "typing":
        raise SiriusIntegrationError(_replaced(hook, function))
    raise SiriusIntegrationError(
        f"{hook.target} is not the one vllm-sirius was written for (source {found}, expected {hook.fingerprint}): another "
        "plugin may have changed it, or vLLM was modified; install the pair named in the README under 'Compatibility and limits'."
    )


def _is_same_file(one: str, other: str | None) -> bool:
    return other is not None and (one == other or Path(one).resolve() == Path(other).resolve())


def _replaced(hook: Hook, found: Any) -> str:
    return (
        f"{hook.target} has been replaced by {_origin(found)}: Sirius attaches to vLLM's own only. Uninstall the plugin or "
        "package that did it, or leave it out by VLLM_PLUGINS."
    )


def _origin(found: Any) -> str:
    """Name, module and file of what somebody put in a symbol's place, by its code and not by what it says of itself."""
    while not hasattr(found, "__code__") and hasattr(found, "func"):  # partial, partialmethod, cached_property
        found = found.func
    code = getattr(found, "__code__", None)
    if not isinstance(code, types.CodeType):
        kind = found if inspect.isclass(found) else type(found)
        return f"an object of {kind.__qualname__} of the module {kind.__module__!r}"
    module = getattr(found, "__globals__", {}).get("__name__", "unknown")
    return f"{code.co_qualname} of the module {module!r} ({code.co_filename})"


def _is_constant(stored: Any) -> bool:
    kinds = (property, staticmethod, classmethod, types.CodeType)
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
