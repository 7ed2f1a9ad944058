"""Operators of compiled graphs act on the engine whose pass runs, whatever engine the graph was made for."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context

from vllm_sirius.integration.graph_operators import SWITCH, register_switch, running_switch


class Switch:
    """What the operators ask a switch for, with a result of its own."""

    def __init__(self, number):
        self.number = float(number)
        self.observed = []
        self.statistics = self.linears = self
        self.observing = True

    def observe(self, layer, activation):
        self.observed.append(layer)

    def is_native(self, num_tokens):
        return True

    def takes(self, inputs, switch):
        return switch is self

    def run_native(self, layer, hidden_states):
        return torch.full_like(hidden_states, self.number + layer)

    def run(self, index, inputs):
        return torch.full((inputs.shape[0], 3), self.number - index)


def engine(number):
    """A switch and the registry of layers of its engine."""
    switch, layers = Switch(number), {}
    register_switch(SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers)), switch)
    return switch, layers


def running(layers):
    return override_forward_context(ForwardContext(no_compile_layers=layers, attn_metadata={}, slot_mapping={}))


def graph(inputs, marker):
    torch.ops.vllm_sirius.observe_ffn(inputs, marker, 1)
    reduced = torch.ops.vllm_sirius.reduced_ffn(inputs, 2)
    return reduced, torch.ops.vllm_sirius.low_bit_linear(inputs, 1, 3)


def test_a_graph_runs_on_the_engine_whose_pass_it_is():
    engines = [engine(10), engine(20)]
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=True)
    for repeat in (1, 2):
        for switch, layers in engines:
            with running(layers):
                reduced, linear = compiled(torch.ones(2, 4), torch.zeros(1))
            assert reduced.tolist() == [[switch.number + 2] * 4] * 2
            assert linear.tolist() == [[switch.number - 1] * 3] * 2
            assert switch.observed == [1] * repeat


def test_a_graph_does_not_keep_an_engine_and_says_that_there_is_none():
    switch, layers = engine(1)
    with running(layers):
        assert running_switch() is switch
        found = weakref.ref(switch)
        del switch
        gc.collect()
        assert found() is None
        with pytest.raises(AssertionError, match="without its switch"):
            running_switch()
    assert list(layers) == [SWITCH]
