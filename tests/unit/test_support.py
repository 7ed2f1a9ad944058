"""What end-to-end tests stand on: prompts, the variables of their engines, the stand-in for a GPU's Triton."""

from __future__ import annotations

import runpy
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from support.engine_host import TESTS, EngineHost
from support.prompts import VOCABULARY, random_prompts


def test_prompts_are_of_many_tokens_and_the_same_in_every_run():
    lengths = (5, 17, 40)
    prompts = random_prompts(*lengths)
    assert [len(prompt) for prompt in prompts] == list(lengths)
    assert all(len(set(prompt)) > len(prompt) // 2 for prompt in prompts)
    assert all(0 <= token < VOCABULARY for prompt in prompts for token in prompt)
    assert prompts == random_prompts(*lengths)


def test_engines_of_tests_multiply_float32_exactly():
    with EngineHost() as host:
        assert host.probe_static("os:getenv", key="TRITON_F32_DEFAULT") == "ieee"
        assert host.probe_static("os:getenv", key="VLLM_FLOAT32_MATMUL_PRECISION") == "highest"


@pytest.mark.parametrize("policies", [("cache",), ("modifier", "eviction")], ids=["one policy", "two policies"])
def test_the_interpreter_stand_in_fits_other_releases_of_triton(monkeypatch, policies):
    class Handle:
        def __init__(self, data, dtype):
            self.data, self.dtype = data, dtype

    class Builder:
        def create_masked_store(self, ptrs, value, mask, *given, **named):
            return mask.data.dtype, given, named

    backends = ModuleType("triton.backends")
    backends.backends = {}
    interpreter = ModuleType("triton.runtime.interpreter")
    interpreter.InterpreterBuilder, interpreter.TensorHandle = Builder, Handle
    interpreter.interpreter_builder = SimpleNamespace(options=SimpleNamespace(sanitize_overflow=True))
    triton, runtime = ModuleType("triton"), ModuleType("triton.runtime")
    triton.backends = backends
    for module in (triton, backends, runtime, interpreter):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the stand-in sets it for good
    runpy.run_path(str(TESTS / "support" / "v2_on_cpu" / "sitecustomize.py"))
    mask = Handle(np.ones(2, dtype=np.int32), "int1")
    assert Builder().create_masked_store("ptrs", "value", mask, *policies) == (np.dtype(bool), policies, {})
    named = {"cache_policy": "cache"}
    assert Builder().create_masked_store("ptrs", "value", mask, **named) == (np.dtype(bool), (), named)
