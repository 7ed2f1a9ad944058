"""The start-up self-test: no draft passes that reads the target's own weights, or none of the copies made for it."""

import pytest
import torch
import torch.nn.functional as F
from test_reduced_ffns import CPU, FFN, HIDDEN, LAYERS, Model, SiluAndMul, reduced
from torch import nn

from vllm_sirius.draft.backends import CoarseRowsBackend, LowBitPanelsBackend
from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.draft.locate import locate_gated_ffns
from vllm_sirius.draft.low_bit_linears import LowBitLinears, quantise_linear
from vllm_sirius.draft.self_test import NUM_TOKENS, assert_draft_is_reduced
from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels, interleave
from vllm_sirius.weights.rows import by_neuron, neuron_rows

VOCABULARY = 32
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Linear(nn.Module):
    """Looks like vLLM's linear layers, or its lm_head, where drafts run them on copies."""

    return_bias, skip_bias_add = True, False

    def __init__(self, outputs, bias=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, HIDDEN), requires_grad=False)
        self.bias = nn.Parameter(torch.full((outputs,), bias), requires_grad=False)
        self.prefix = f"linear_{outputs}"
        self.quant_method = Method()

    def forward(self, x):
        return F.linear(x, self.weight, self.bias), None


class Method:
    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)


class Decoder(nn.Module):
    """FFNs behind a linear layer each, and an lm_head."""

    def __init__(self, bias=0.0):
        super().__init__()
        self.linears = nn.ModuleList(Linear(HIDDEN, bias) for _ in range(LAYERS))
        self.layers = nn.ModuleList(FFN() for _ in range(LAYERS))
        self.lm_head = Linear(VOCABULARY)

    def forward(self, x):
        for linear, layer in zip(self.linears, self.layers, strict=True):
            x = x + linear(x)[0]
            x = x + layer(x)
        return self.lm_head.quant_method.apply(self.lm_head, x)


def rounded(model, bits, all_layers=True):
    """The switch in a decoder that drafts with all neurons, quantised."""
    ffns = locate_gated_ffns(model)
    if bits == 4:
        panels = []
        for ffn in ffns:
            gate, up = (LowBitPanels.quantise(half) for half in ffn.gate_up.weight.split(ffn.num_neurons))
            panels.append((interleave(gate, up), LowBitPanels.quantise(ffn.down.weight)))
        backend = LowBitPanelsBackend(ffns, panels)
    else:
        rows = [neuron_rows(ffn.gate_up.weight, ffn.down.weight, True, by_neuron) for ffn in ffns]
        backend = CoarseRowsBackend(ffns, [LowBitRows.quantise(part, 8) for part in rows])
    linears = None
    if all_layers:
        copies = {layer: quantise_linear(layer.weight, bits) for layer in model.linears}
        linears = LowBitLinears(copies, (model.lm_head, quantise_linear(model.lm_head.weight, bits)))
    found = ReducedFFNs(ffns, 1.0, None, None, backend, linears)
    found.install()
    return found


def self_test(model, ffns, dtype=torch.float32, draft_pass=None):
    def run():
        with ffns.draft_mode():
            model(torch.randn(NUM_TOKENS, HIDDEN, dtype=dtype))

    return assert_draft_is_reduced(ffns, draft_pass or run, dtype, CPU)


def test_a_reduced_draft_passes_and_so_does_one_of_all_neurons():
    for density in (0.5, 1.0):
        model = Model()
        difference = self_test(model, reduced(model, density=density))
        assert (difference > 0.05) == (density < 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.003, 0.05), (4, 0.03, 0.5)])
def test_a_rounded_draft_passes_and_differs_as_its_bits_say(bits, least, most, dtype):
    model = Decoder().to(dtype)
    assert least < self_test(model, rounded(model, bits), dtype) < most


@pytest.mark.parametrize("bits", [8, 4])
def test_copies_that_are_exact_pass(bits):
    model = Decoder(bias=1.0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.zero_()
    assert self_test(model, rounded(model, bits)) < 1e-6


def test_an_ffn_that_lost_its_switch_is_noticed():
    model = Model()
    ffns = reduced(model, native=False)
    model.layers[1].act_fn = SiluAndMul()
    with pytest.raises(SiriusIntegrationError, match=r"'layers\.1' drafts with all its neurons"):
        self_test(model, ffns)


def test_a_model_that_does_not_run_the_switched_modules_is_noticed():
    model = Model()
    with pytest.raises(SiriusIntegrationError, match="ran 0 of 3 FFNs reduced"):
        self_test(model, reduced(model, native=False), draft_pass=lambda: None)


@pytest.mark.parametrize("bits", [8, 4])
def test_steps_of_several_tokens_on_the_target_s_own_layers_are_noticed(bits):
    """The kernels once handed everything beyond one token over, and the draft "differed by 0.0%"."""
    model = Decoder()
    ffns = rounded(model, bits)
    ffns.backend.max_tokens = 1
    with pytest.raises(
        SiriusIntegrationError, match=r"'layers\.0' drafts on the target's own weights .*by 0\.0%, its ker"
    ):
        self_test(model, ffns)


@pytest.mark.parametrize("bias", [0.0, 1000.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_linear_layer_on_the_target_s_own_weights_is_noticed(bits, bias):
    """Even where a large bias hides most of the difference."""
    model = Decoder(bias)
    ffns = rounded(model, bits)
    model.linears[2].__class__ = Linear
    with pytest.raises(SiriusIntegrationError, match=r"'linear_12' drafts on the target's own weights"):
        self_test(model, ffns)


def test_an_lm_head_on_the_target_s_own_weight_is_noticed():
    model = Decoder()
    ffns = rounded(model, 4)
    model.lm_head.quant_method = Method()
    with pytest.raises(SiriusIntegrationError, match=r"'lm_head' drafts on the target's own weights"):
        self_test(model, ffns)


def test_a_draft_pass_of_other_modules_is_noticed():
    """As a compiled graph that froze the way in which it was traced."""
    model = Decoder()
    ffns = rounded(model, 4)
    x = torch.randn(NUM_TOKENS, HIDDEN)

    def only(*modules):
        def run():
            with ffns.draft_mode():
                for module in modules:
                    module(x)

        return run

    def masked():
        ffns.num_draft_calls += LAYERS

    with pytest.raises(SiriusIntegrationError, match=r"ran 0 of 3 FFNs on the draft's kernels"):
        self_test(model, ffns, draft_pass=masked)
    with pytest.raises(SiriusIntegrationError, match=r"ran 0 of 3 linear layers .* not 'linear_12'"):
        self_test(model, ffns, draft_pass=only(*model.layers))
    # Others that run several times do not stand for the one that does not run.
    with pytest.raises(SiriusIntegrationError, match="ran 2 of 3 linear layers on their quantised copies, and not"):
        self_test(model, ffns, draft_pass=only(*model.layers, *2 * list(model.linears[:2])))
    with pytest.raises(SiriusIntegrationError, match="did not run the lm_head on its copy"):
        self_test(model, ffns, draft_pass=only(*model.layers, *model.linears))


def test_a_layer_that_the_model_never_calls_is_said_and_one_that_may_run_several_times_is_enough(caplog):
    """Some models multiply by a layer's weight themselves."""
    model = Decoder()
    ffns = rounded(model, 4)
    asked = []

    def run():
        with ffns.draft_mode():
            x = torch.randn(NUM_TOKENS, HIDDEN)
            for module in (*model.layers, model.linears[0], model.linears[0], model.linears[2]):
                module(x)
            model.lm_head.quant_method.apply(model.lm_head, x)

    def never_called(layers):
        asked.extend(layers)
        return layers

    with caplog.at_level("INFO", "vllm.sirius"):
        assert_draft_is_reduced(ffns, run, torch.float32, CPU, never_called)
    assert asked == [model.linears[1]]
    assert "do not read the quantised copies of 1 linear layers" in caplog.text


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damaged_weights_are_named_as_such(damage):
    model = Decoder()
    ffns = rounded(model, 4)
    model.layers[1].down_proj.weight[3, 4] = damage
    with pytest.raises(
        SiriusIntegrationError, match=r"'layers\.1' of the target gives numbers that are not finite.*NaN"
    ):
        self_test(model, ffns)


def test_a_step_that_tries_the_other_way_runs_the_model_s_own_layers():
    model = Decoder()
    ffns = rounded(model, 4)
    x = torch.randn(NUM_TOKENS, HIDDEN)
    target = model(x)
    with ffns.draft_mode():
        usual = model(x)
        ffns.switch.kernels = False
        other = model(x)
    assert torch.equal(other, target)
    assert not torch.allclose(usual, target, rtol=1e-2)
    assert (ffns.num_draft_calls, ffns.num_native_calls) == (2 * LAYERS, LAYERS)


def test_layers_are_checked_in_the_order_of_a_pass():
    """So that a target on a disk is streamed once for all of them."""
    model, places = Decoder(), []
    for number, (linear, layer) in enumerate(zip(model.linears, model.layers, strict=True)):
        linear.prefix = f"layers.{number}.linear"
        for part, module in enumerate((linear, layer)):
            module.register_forward_hook(lambda *_, place=(number, part): places.append(place))
    with pytest.raises(SiriusIntegrationError, match=f"ran 0 of {LAYERS} FFNs reduced"):
        self_test(model, rounded(model, 4), draft_pass=lambda: None)
    assert places == sorted(places)
    assert set(places) == {(number, part) for number in range(LAYERS) for part in (0, 1)}
