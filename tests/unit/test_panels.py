"""The kernel of the target's linear layers computes what its PyTorch twin computes, and is chosen by the processor."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch

from vllm_sirius.kernels.cpu import panel_linear as kernel
from vllm_sirius.kernels.cpu.panel_linear import Products, available_products, has_panels, panel_linear
from vllm_sirius.target import choice
from vllm_sirius.weights.panels import Panels, panel_linear_reference

HAS_COMPILER = bool(os.environ.get("CXX")) or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
pytestmark = pytest.mark.usefixtures("fresh_input", "one_or_two_threads")
needs_kernel = pytest.mark.skipif(not HAS_COMPILER or not has_panels(), reason="needs a C++ compiler and AVX-512")

SHAPES = [(1, 1), (16, 2), (17, 33), (100, 7), (129, 130), (300, 257)]


def draw(num_outputs: int, width: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, weight and bias."""
    weight = (torch.randn(num_outputs, width) / width**0.5).bfloat16()
    return torch.randn(tokens, width).bfloat16(), weight, torch.randn(num_outputs).bfloat16()


def assert_rounded_alike(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    """Equal but for fp32 sums in another order, which may move a result to the next bf16 number."""
    error = (actual.float() - expected.float()).abs()
    assert (error <= expected.float().abs() / 128 + 1e-5 * scale).all()


@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
def test_panels_keep_every_value(num_outputs, width):
    weight = torch.randn(num_outputs, width).bfloat16()
    panels = Panels.pack(weight)
    assert torch.equal(panels.unpack(), weight)
    assert panels.weights.float().abs().sum() == pytest.approx(weight.float().abs().sum().item(), rel=1e-4)
    assert torch.equal(Panels.pack(weight.T.contiguous().T).weights, panels.weights)


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 4), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(0, 4).bfloat16()]
)
def test_other_weights_are_refused(weight):
    with pytest.raises(ValueError, match="panels hold bfloat16"):
        Panels.pack(weight)


@pytest.fixture(params=list(Products))
def products(request) -> Products:
    """Each way to multiply, as far as this processor has it."""
    if request.param not in available_products():
        pytest.skip(f"this processor cannot multiply by {request.param.name.lower()}")
    return request.param


@needs_kernel
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
def test_kernel_matches_its_twin(num_outputs, width, with_bias, num_threads, products):
    torch.set_num_threads(num_threads)
    for tokens in (*range(1, 18), 33, 131):
        inputs, weight, bias = draw(num_outputs, width, tokens)
        panels, added = Panels.pack(weight), bias if with_bias else None
        actual = panel_linear(inputs, panels.weights, num_outputs, added, products)
        assert actual.shape == (tokens, num_outputs)
        scale = inputs.float().abs() @ weight.float().abs().T + 1.0
        assert_rounded_alike(actual, panel_linear_reference(inputs, panels, added), scale)


@needs_kernel
def test_a_token_does_not_depend_on_its_company(products):
    num_outputs, width = 173, 515
    inputs, weight, bias = draw(num_outputs, width, 140)
    panels = Panels.pack(weight)
    together = panel_linear(inputs, panels.weights, num_outputs, bias, products)
    for tokens in (1, 2, 5, 8, 11, 13, 16, 17, 40, 130):
        torch.set_num_threads(random.choice((1, 2)))
        alone = panel_linear(inputs[:tokens], panels.weights, num_outputs, bias, products)
        assert torch.equal(alone, together[:tokens])


@needs_kernel
def test_kernel_takes_leading_dimensions_strides_and_no_tokens():
    inputs, weight, _ = draw(20, 24, 12)
    panels = Panels.pack(weight)
    expected = panel_linear(inputs, panels.weights, 20)
    assert torch.equal(panel_linear(inputs.view(3, 4, 24), panels.weights, 20), expected.view(3, 4, 20))
    assert torch.equal(panel_linear(inputs.T.contiguous().T, panels.weights, 20), expected)
    assert panel_linear(inputs[:0], panels.weights, 20).shape == (0, 20)


@needs_kernel
def test_kernel_passes_on_what_is_not_finite(products):
    inputs, weight, _ = draw(40, 9, 3)
    inputs[1, 4], inputs[2, 8] = float("inf"), float("nan")
    output = panel_linear(inputs, Panels.pack(weight).weights, 40, products=products)
    assert output[0].isfinite().all()
    assert not output[1].isfinite().any()
    assert output[2].isnan().all()


@needs_kernel
@pytest.mark.parametrize(
    ("inputs", "bias", "message"),
    [
        (torch.zeros(2, 8), None, "inputs must be bfloat16"),
        (torch.zeros(2, 6).bfloat16(), None, "inputs must be bfloat16"),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(3), "bias must be"),
    ],
)
def test_kernel_refuses_what_does_not_fit(inputs, bias, message):
    with pytest.raises(ValueError, match=message):
        panel_linear(inputs, Panels.pack(torch.zeros(4, 8).bfloat16()).weights, 4, bias)


def test_the_processor_decides_which_kernel_runs(monkeypatch):
    """Not a measurement: the two kernels round differently, and answers must not depend on how busy a start was."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choice.choose_by_processor() == choice.TargetKernels(False, "the processor has AMX, which they use")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choice.choose_by_processor().panels


@needs_kernel
def test_the_maker_of_the_processor_decides_how_it_multiplies(monkeypatch):
    chosen = {}
    for prefers_pairs in (True, False):
        monkeypatch.setattr(kernel, "prefers_pairs", lambda answer=prefers_pairs: answer)
        chosen[prefers_pairs] = kernel.default_products.__wrapped__()
    has_pairs = Products.PAIRS in available_products()
    assert chosen == {True: Products.PAIRS if has_pairs else Products.FLOATS, False: Products.FLOATS}


def test_reasons_against_the_kernel(monkeypatch):
    cpu = torch.device("cpu")
    assert "torch.float32" in choice.why_no_panels(torch.float32, cpu)
    assert "cuda" in choice.why_no_panels(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(choice, "has_panels", lambda: False)
    assert choice.why_no_panels(torch.bfloat16, cpu) == "the kernel needs AVX-512"
    monkeypatch.setattr(choice, "has_panels", lambda: True)
    assert choice.why_no_panels(torch.bfloat16, cpu) == ""
    monkeypatch.setenv("SIRIUS_NATIVE_KERNELS", "0")
    assert choice.why_no_panels(torch.bfloat16, cpu) == "SIRIUS_NATIVE_KERNELS=0"
