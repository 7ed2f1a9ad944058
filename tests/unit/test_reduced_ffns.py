"""Finding gated FFNs, the switch between target and draft, and what the kernels make of them, on toy modules."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vllm_sirius.draft.backends import CoarseRowsBackend, FineRowsBackend
from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.draft.locate import locate_gated_ffns
from vllm_sirius.draft.low_bit_linears import LowBitLinears, quantise_linear
from vllm_sirius.draft.self_test import backend_reproduces_ffns
from vllm_sirius.errors import SiriusIntegrationError, SiriusUnsupportedError
from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.native import SWITCH, choose_kernels
from vllm_sirius.sparsity.coarse import CoarseSelection
from vllm_sirius.sparsity.observation import ObservedRows
from vllm_sirius.sparsity.statistics import NeuronStatistics
from vllm_sirius.weights.rows import by_neuron, gates_first, neuron_norms, neuron_rows

CPU = torch.device("cpu")
HIDDEN, NEURONS, LAYERS = 12, 20, 3


class Projection(nn.Module):
    """Looks like vLLM's parallel linear layers where Sirius reads them."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.input_size = self.input_size_per_partition = inputs
        self.output_partition_sizes = [outputs // 2] * 2

    def forward(self, x):
        return F.linear(x, self.weight), None


class SiluAndMul(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class MulAndSilu(nn.Module):
    def forward(self, x):
        up, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class GeluAndMul(nn.Module):
    approximate = "tanh"

    def forward(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up


class RelusquaredAndMul(SiluAndMul):
    pass


class Squared(SiluAndMul):
    pass


class FFN(nn.Module):
    def __init__(self, activation=SiluAndMul, scale=1.0):
        super().__init__()
        self.gate_up_proj = Projection(HIDDEN, 2 * NEURONS)
        self.act_fn = activation()
        self.down_proj = Projection(NEURONS, HIDDEN)
        self.scale = scale

    def forward(self, x):
        hidden, _ = self.gate_up_proj(x)
        output, _ = self.down_proj(self.act_fn(hidden))
        return output * self.scale


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(FFN(**options) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def backend_of(ffns, fine):
    layout = gates_first if fine else by_neuron
    rows = [neuron_rows(f.gate_up.weight, f.down.weight, f.gate_first, layout) for f in ffns]
    return FineRowsBackend(ffns, rows) if fine else CoarseRowsBackend(ffns, rows)


def reduced(model, density=0.5, fine=False, native=True):
    ffns = locate_gated_ffns(model)
    sizes = [ffn.num_neurons for ffn in ffns]
    selection = statistics = None
    if not fine:
        selection = CoarseSelection(sizes, density, torch.float32, CPU)
        selection.select(torch.rand(sum(sizes)))
        statistics = NeuronStatistics(sizes, 2, 8, CPU, decay=1.0)
    found = ReducedFFNs(ffns, density, selection, statistics, backend_of(ffns, fine) if native else None)
    found.install()
    return found


def test_gated_ffns_are_found_in_order_with_their_sizes():
    ffns = locate_gated_ffns(Model())
    assert [ffn.name for ffn in ffns] == ["layers.0", "layers.1", "layers.2"]
    assert {(ffn.hidden_size, ffn.num_neurons, ffn.activation, ffn.gate_first) for ffn in ffns} == {
        (HIDDEN, NEURONS, Activation.SILU, True)
    }
    assert ffns[0].num_parameters == 3 * HIDDEN * NEURONS


def test_experts_and_other_modalities_are_left_alone():
    model = nn.ModuleDict({"experts": FFN(), "vision_tower": FFN(), "mlp": FFN()})
    assert [ffn.name for ffn in locate_gated_ffns(model)] == ["mlp"]


def test_a_model_without_gated_ffns_is_refused():
    with pytest.raises(SiriusUnsupportedError, match=r"Sequential has no dense gated FFN.*without --speculative-model"):
        locate_gated_ffns(nn.Sequential(nn.Linear(3, 3)))


def test_an_activation_that_is_no_product_is_refused_by_name():
    with pytest.raises(SiriusUnsupportedError, match=r"'layers\.0' uses the activation Squared"):
        locate_gated_ffns(Model(activation=Squared))


def test_an_unknown_product_can_only_be_masked():
    model = Model(activation=RelusquaredAndMul)
    assert [ffn.activation for ffn in locate_gated_ffns(model)] == [None] * LAYERS
    ffns = reduced(model, native=False)
    with ffns.draft_mode():
        assert model(torch.randn(2, HIDDEN)).shape == (2, HIDDEN)
    assert ffns.num_draft_calls == LAYERS


def test_rows_hold_gate_up_and_down_of_each_neuron():
    gate_up, down = torch.randn(2 * NEURONS, HIDDEN), torch.randn(HIDDEN, NEURONS)
    rows = neuron_rows(gate_up, down)
    assert torch.equal(rows[3], torch.stack([gate_up[3], gate_up[NEURONS + 3], down[:, 3]]))
    swapped = neuron_rows(gate_up, down, gate_first=False)
    assert torch.equal(swapped[3], torch.stack([gate_up[NEURONS + 3], gate_up[3], down[:, 3]]))
    assert rows.is_contiguous()
    torch.testing.assert_close(neuron_norms(down), down.norm(dim=0) ** 2)


@pytest.mark.parametrize("activation", [SiluAndMul, MulAndSilu, GeluAndMul])
@pytest.mark.parametrize("native", [True, False])
def test_coarse_draft_is_the_ffn_without_the_dropped_neurons(activation, native):
    model = Model(activation=activation)
    ffns = reduced(model, native=native)
    x = torch.randn(4, HIDDEN)
    ffn = model.layers[1]
    hidden = ffn.act_fn.original(ffn.gate_up_proj(x)[0])
    kept = ffns.selection.indices[1].long()
    expected = hidden[:, kept] @ ffn.down_proj.weight[:, kept].t()
    with ffns.draft_mode():
        torch.testing.assert_close(ffn(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ffn(x), hidden @ ffn.down_proj.weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [SiluAndMul, MulAndSilu, GeluAndMul])
def test_native_and_masked_fine_drafts_agree(activation):
    torch.manual_seed(5)
    model = Model(activation=activation)
    x = torch.randn(3, HIDDEN)
    ffns = reduced(model, density=0.4, fine=True)
    with ffns.draft_mode():
        native = model(x)
    calls = ffns.num_draft_calls
    ffns.backend = None
    with ffns.draft_mode():
        masked = model(x)
    assert ffns.num_draft_calls == calls + LAYERS
    torch.testing.assert_close(native, masked, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(masked, model(x), rtol=1e-2)


def test_large_batches_take_the_masked_way():
    model = Model()
    ffns = reduced(model)
    x = torch.randn(ffns.backend.max_tokens + 1, HIDDEN)
    with ffns.draft_mode():
        together = model(x)
        apart = torch.cat([model(part) for part in x.split(4)])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-2)


def test_target_mode_feeds_the_statistics_and_draft_mode_does_not():
    model = Model()
    ffns = reduced(model)
    slot = ffns.statistics.acquire()
    ffns.statistics.begin_step([ObservedRows(slot, 0, 2, pending=False)])
    x = torch.randn(2, HIDDEN)
    with ffns.draft_mode():
        model(x)
    assert ffns.statistics.energy.count_nonzero() == 0
    model(x)
    torch.testing.assert_close(ffns.statistics.energy[slot].view(LAYERS, -1).sum(1), torch.full((LAYERS,), 2.0))


def test_rows_do_not_stand_in_for_an_ffn_that_computes_more():
    for scale, expected in ((1.0, True), (1.2, False)):
        ffns = reduced(Model(scale=scale))
        assert ffns.backend is not None
        assert backend_reproduces_ffns(ffns.ffns, ffns.backend, torch.float32, CPU) == expected


class Linear(Projection):
    skip_bias_add, return_bias, bias = False, True, None


class HeadMethod:
    pass


def test_graphs_that_outlive_an_engine_keep_only_the_classes_of_its_modules():
    """PyTorch's graphs stay in the process and name the classes of modules; copies of weights must not hang on those."""
    model = Model()
    model.attention, model.lm_head = Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, NEURONS, bias=False)
    model.lm_head.quant_method = HeadMethod()
    ffns = locate_gated_ffns(model)
    rows = {model.attention: quantise_linear(model.attention.weight.data, 8)}
    linears = LowBitLinears(rows, (model.lm_head, quantise_linear(model.lm_head.weight.data, 8)))
    switch = ReducedFFNs(ffns, 1.0, None, None, backend_of(ffns, fine=False), linears)
    switch.install()
    classes = {type(module) for module in model.modules()} | {type(model.lm_head.quant_method)}
    assert sum("Sirius" in kind.__name__ for kind in classes) == LAYERS + 2
    held = [weakref.ref(thing) for thing in (model, switch, switch.backend, linears)]
    del model, ffns, rows, linears, switch
    gc.collect()
    assert [thing() for thing in held] == [None] * len(held)


def test_kernels_can_be_switched_off_and_say_why(monkeypatch):
    assert choose_kernels(torch.float32, CPU).native
    assert not choose_kernels(torch.float64, CPU).native
    monkeypatch.setenv(SWITCH, "0")
    choice = choose_kernels(torch.float32, CPU)
    assert not choice.native
    assert choice.reason == f"{SWITCH}=0"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_kernels_are_not_compared_with_an_ffn_whose_output_is_not_finite(value):
    """It does not compute more than the kernels; its weights are to blame."""
    model = Model()
    ffns = reduced(model)
    model.layers[1].down_proj.weight[3, 4] = value
    with pytest.raises(
        SiriusIntegrationError, match=r"the FFN 'layers\.1' of the target gives numbers that are not finite"
    ):
        backend_reproduces_ffns(ffns.ffns, ffns.backend, torch.float32, CPU)
