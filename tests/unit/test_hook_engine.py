"""The hook engine on a toy module: all or none, idempotent, drift, loss and hooks of strangers noticed."""

import functools
import importlib.util
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
    module.greet, module.Counter, module.__file__ = greet, owner, __file__
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


WITHOUT_SOURCE = """
def hook(original):
    def replaced(*args):
        return original(*args)
    return replaced
"""

WITH_WRAPS = """
import functools

def hook(original):
    @functools.wraps(original)
    def replaced(*args):
        return original(*args)
    return replaced
"""


def without_source(original, folder):
    namespace = {"__name__": "stranger"}
    exec(WITHOUT_SOURCE, namespace)
    return namespace["hook"](original)


def with_wraps(original, folder):
    file = folder / "stranger.py"
    file.write_text(WITH_WRAPS)
    spec = importlib.util.spec_from_file_location("stranger", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.hook(original)


def in_a_partial(original, folder):
    return functools.partial(without_source(original, folder))


class Unprintable:
    __module__ = "stranger"

    def __call__(self):
        return 3

    def __repr__(self):
        raise RuntimeError("not to be looked at")


def callable_object(original, folder):
    return Unprintable()


@pytest.mark.parametrize("stranger", [without_source, with_wraps, in_a_partial, callable_object])
@pytest.mark.parametrize("name", ["step", "size", "make"])
def test_the_hook_of_a_stranger_is_named(toy, tmp_path, stranger, name):
    dress = {"step": lambda function: function, "size": property, "make": staticmethod}[name]
    stored = vars(Counter)[name]
    plain = {"size": lambda: stored.fget, "make": lambda: stored.__func__}.get(name, lambda: stored)()
    foreign = dress(stranger(plain, tmp_path))
    setattr(toy.Counter, name, foreign)
    hooks = [hook("toy_upstream:greet", greet), hook(f"toy_upstream:Counter.{name}", plain)]
    with pytest.raises(SiriusIntegrationError) as caught:
        install(hooks)
    text = str(caught.value)
    assert text.startswith(f"toy_upstream:Counter.{name} has been replaced by ")
    assert "module 'stranger'" in text
    assert "VLLM_PLUGINS" in text
    assert vars(toy.Counter)[name] is foreign
    assert toy.greet("you") == "hello you"


def test_a_hook_that_cannot_be_put_in_takes_the_others_out(toy):
    class Sealed(type):
        def __setattr__(cls, name, value):
            raise TypeError("sealed")

    toy.Sealed = Sealed("Sealed", (), {"step": Counter.step})
    hooks = [hook("toy_upstream:greet", greet, aliases=("toy_user",)), hook("toy_upstream:Sealed.step", Counter.step)]
    with pytest.raises(TypeError, match="sealed"):
        install(hooks)
    assert toy.greet is greet
    assert sys.modules["toy_user"].greet is greet


def test_resolve_returns_the_stored_attribute(toy):
    owner, name, stored = resolve("toy_upstream:Counter.size")
    assert owner is toy.Counter
    assert name == "size"
    assert isinstance(stored, property)


def test_engine_knows_nothing_of_sirius_or_vllm():
    assert "vllm" not in {
        name.split(".")[0] for name in vars(hook_engine) if isinstance(vars(hook_engine)[name], types.ModuleType)
    }
