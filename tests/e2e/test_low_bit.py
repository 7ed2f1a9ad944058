"""Drafts on quantised copies: lossless stays lossless, acceptance is close to that of whole weights (runner v1)."""

import pytest
from support.engine_host import EngineError, EngineHost
from support.real_models import SMOL, mixed_prompts, model_path

SAMPLING = {"max_tokens": 24, "ignore_eos": True}
ENGINE = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 4}
LOSSLESS = {"method": "sirius", "kernel_size": 8, "adaptive": False}

CONFIGURATIONS = [
    # options, least part of the drafts that must be accepted
    pytest.param({"draft_weights": "int8", "sparsity": "none"}, 0.8, id="int8-whole-all"),
    pytest.param({"draft_weights": "int4", "sparsity": "none", "draft_weights_scope": "ffn"}, 0.5, id="int4-whole-ffn"),
    pytest.param(
        {"draft_weights": "int4", "sparsity": "fine", "density": 0.5},
        0.1,
        id="int4-fine-all",
    ),
    pytest.param({"draft_weights": "int8", "density": 0.5, "draft_weights_scope": "ffn"}, 0.05, id="int8-coarse-ffn"),
]


@pytest.fixture(scope="module")
def v1():
    with EngineHost() as host:
        yield host


@pytest.fixture(scope="module")
def reference(v1):
    return v1.generate(ENGINE, mixed_prompts(SMOL, 4), SAMPLING).token_ids


@pytest.mark.parametrize(("options", "least"), CONFIGURATIONS)
def test_low_bit_drafts_are_token_identical_v1(v1, reference, options, least):
    engine = {**ENGINE, "speculative_config": {**LOSSLESS, **options}}
    found = v1.generate(engine, mixed_prompts(SMOL, 4), SAMPLING)
    assert found.token_ids == reference
    assert least < found.num_accepted_tokens / found.num_draft_tokens < 1.0
    report = v1.probe(engine, "support.probes:draft_report")
    assert report["native"]
    assert report["draft_calls"] > 0


@pytest.mark.slow
def test_compiled_low_bit_drafts_are_the_same_v1(v1):
    found = {}
    for eager in (True, False):
        options = {**LOSSLESS, "draft_weights": "int4", "sparsity": "none"}
        engine = {**ENGINE, "enforce_eager": eager, "speculative_config": options}
        found[eager] = v1.generate(engine, mixed_prompts(SMOL, 4), SAMPLING)
        assert v1.probe(engine, "support.probes:compiled_draft_report")["compiled"] == (not eager)
    assert found[True].token_ids == found[False].token_ids
    # Fused sums round differently, which four-bit drafts show now and then.
    assert found[False].acceptance_length == pytest.approx(found[True].acceptance_length, rel=0.15)


def test_low_bit_drafts_are_refused_without_kernels_v1():
    with EngineHost({"SIRIUS_NATIVE_KERNELS": "0"}) as host, pytest.raises(EngineError) as refusal:
        host.generate({**ENGINE, "speculative_config": {**LOSSLESS, "draft_weights": "int8"}}, [[1, 2]], SAMPLING)
    assert "draft_weights='int8' needs the compiled kernels" in str(refusal.value)
    assert "draft_weights='shared'" in str(refusal.value)
