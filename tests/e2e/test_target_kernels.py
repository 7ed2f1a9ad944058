"""The target's linear layers on Sirius's kernel: the same model, and refused where the kernel cannot run (runner v1)."""

import pytest
from support.engine_host import EngineError, EngineHost
from support.real_models import SMOL, mixed_prompts, model_path

SAMPLING = {"max_tokens": 24, "ignore_eos": True, "logprobs": 0}
ENGINE = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 4, "dtype": "bfloat16"}
LOSSLESS = {"method": "sirius", "kernel_size": 8, "adaptive": False, "draft_weights": "int8"}


def engine(kernels: str, **options) -> dict:
    return {**ENGINE, **options, "speculative_config": {**LOSSLESS, "target_kernels": kernels}}


@pytest.fixture(scope="module")
def v1():
    with EngineHost() as host:
        yield host


def test_both_kernels_serve_the_same_model_v1(v1):
    prompts = mixed_prompts(SMOL, 4)
    found = {kernels: v1.generate(engine(kernels), prompts, SAMPLING) for kernels in ("vllm", "sirius")}
    report = v1.probe(engine("sirius"), "support.probes:target_kernels_report")
    assert report["panels"] == report["linears"] > 0
    assert report["head"]
    compared = 0
    for ours, theirs in zip(found["sirius"].completions, found["vllm"].completions, strict=True):
        # bfloat16 rounding may part two answers; up to there they are the same to rounding.
        for position, (token, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
            if token != other:
                break
            assert ours.logprobs[position] == pytest.approx(theirs.logprobs[position], abs=0.2)
            compared += 1
    assert compared > 48


@pytest.mark.slow
def test_compiled_engines_do_not_share_code_v1(v1):
    """A graph compiled for vLLM's kernels must not be loaded for Sirius's, or the other way round."""
    prompts = mixed_prompts(SMOL, 2)
    eager = v1.generate(engine("sirius", enforce_eager=True), prompts, SAMPLING)
    for kernels in ("vllm", "sirius"):
        compiled = v1.generate(engine(kernels, enforce_eager=False), prompts, SAMPLING)
        assert [c.token_ids[0] for c in compiled.completions] == [c.token_ids[0] for c in eager.completions]
        report = v1.probe(engine(kernels, enforce_eager=False), "support.probes:target_kernels_report")
        assert (report["panels"] > 0) == (kernels == "sirius")
        assert (report["compiled_calls"] > 0) == (kernels == "sirius")


def test_what_cannot_run_is_refused_v1(v1):
    with pytest.raises(EngineError) as refusal:
        v1.generate({**engine("sirius"), "dtype": "float32"}, [[1, 2]], SAMPLING)
    assert "target_kernels='sirius' cannot be used here" in str(refusal.value)
    assert "use 'auto' or 'vllm'" in str(refusal.value)
