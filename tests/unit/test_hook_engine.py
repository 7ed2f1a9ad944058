"""The hook engine on a toy module: all or none, idempotent, drift and loss noticed."""

import sys
import types

import pytest

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.integration import hook_engine
from vllm_sirius.integration.hook_engine import Hook, install, is_installed, resolve, source_fingerprint


def greet(name):
    return f"hello {name}"


class Counter:
    def step(self):
        return 1

    @property
    def size(self):
        return 10

    @staticmethod
    def make():
        return "made"


@pytest.fixture
def toy(monkeypatch):
    module = types.ModuleType("toy_upstream")
    owner = type("Counter", (), dict(vars(Counter)))
    module.greet, module.Counter = greet, owner
    user = types.ModuleType("toy_user")
    user.greet = greet
    monkeypatch.setitem(sys.modules, "toy_upstream", module)
    monkeypatch.setitem(sys.modules, "toy_user", user)
    return module


def hook(target, original, make=None, fingerprint=None, aliases=()):
    return Hook(
        target=target,
        make=make or (lambda inner: lambda *args: ("wrapped", inner(*args))),
        fingerprint=fingerprint or source_fingerprint(original),
        why="",
        untouched="",
        remove_when="",
        aliases=aliases,
    )


def test_functions_methods_properties_and_static_methods_are_wrapped(toy):
    hooks = [
        hook("toy_upstream:greet", greet, aliases=("toy_user", "toy_not_loaded")),
        hook("toy_upstream:Counter.step", Counter.step),
        hook("toy_upstream:Counter.size", Counter.size),
        hook("toy_upstream:Counter.make", Counter.make),
    ]
    assert install(hooks) == [each.target for each in hooks]
    assert toy.greet("you") == ("wrapped", "hello you")
    assert sys.modules["toy_user"].greet("you") == ("wrapped", "hello you")
    assert toy.Counter().step() == ("wrapped", 1)
    assert toy.Counter().size == ("wrapped", 10)
    assert toy.Counter.make() == ("wrapped", "made")
    assert all(is_installed(each) for each in hooks)


def test_installing_twice_wraps_once(toy):
    hooks = [hook("toy_upstream:greet", greet)]
    install(hooks)
    assert install(hooks) == []
    assert toy.greet("you") == ("wrapped", "hello you")


def test_one_changed_symbol_stops_all(toy):
    hooks = [hook("toy_upstream:greet", greet), hook("toy_upstream:Counter.step", Counter.step, fingerprint="0" * 12)]
    with pytest.raises(SiriusIntegrationError, match=r"Counter\.step.*expected 000000000000"):
        install(hooks)
    assert toy.greet("you") == "hello you"
    assert not is_installed(hooks[0])


@pytest.mark.parametrize("target", ["toy_upstream:Counter.gone", "toy_upstream:gone", "no_such_module:x"])
def test_a_missing_symbol_is_named(toy, target):
    with pytest.raises(SiriusIntegrationError, match="vLLM has no " + target.replace(".", r"\.")):
        install([hook("toy_upstream:greet", greet), hook(target, greet)])
    assert toy.greet("you") == "hello you"


def test_fingerprints_can_be_waived_but_symbols_cannot(toy):
    install([hook("toy_upstream:greet", greet, fingerprint="0" * 12)], check_fingerprints=False)
    assert toy.greet("you") == ("wrapped", "hello you")
    with pytest.raises(SiriusIntegrationError):
        install([hook("toy_upstream:gone", greet)], check_fingerprints=False)


def test_resolve_returns_the_stored_attribute(toy):
    owner, name, stored = resolve("toy_upstream:Counter.size")
    assert owner is toy.Counter
    assert name == "size"
    assert isinstance(stored, property)


def test_engine_knows_nothing_of_sirius_or_vllm():
    assert "vllm" not in {
        name.split(".")[0] for name in vars(hook_engine) if isinstance(vars(hook_engine)[name], types.ModuleType)
    }
