"""Any gated FFN of vLLM: found by structure, drafted with, token-identical when lossless; everything else refused."""

import pytest
from support.engine_host import EngineError
from support.prompts import random_prompts
from support.runners import only_v1
from support.tiny_catalogue import GATED, MIXED, REFUSED, TINY_MODELS
from support.tiny_models import build

PROMPTS = random_prompts(5, 17, 40)
SAMPLING = {"max_tokens": 20, "ignore_eos": True}
FIXED = {"method": "sirius", "kernel_size": 5, "adaptive": False}
COARSE = {**FIXED, "sparsity": "coarse"}
FINE = {**FIXED, "sparsity": "fine", "density": 0.3}

KNOWN_ACTIVATIONS = ("SiluAndMul", "MulAndSilu", "GeluAndMul")
"""Others are masked, which coarse sparsity alone can do."""

REFUSAL_WORDS = {
    "mamba layers": "cannot be rolled back",
    "short-convolution layers": "cannot be rolled back",
    "latent attention": "latent attention (MLA)",
    "pooling model": "text generation only",
    "mixture of experts without a dense FFN": "no dense gated FFN",
    "non-gated FFN": "no dense gated FFN",
}

V1_SLOW = (
    *("llama_tied", "mistral", "qwen3", "gemma", "gemma3", "granite", "cohere"),
    *("exaone", "exaone4", "ernie45", "hyperclovax", "internlm2", "olmo2"),
)
"""Models with the parts of others that `make test` runs; these are for `make test-all`."""

V2_GATED = ("llama", "mistral_sliding", "gemma2", "gemma3n", "gemma4_kv_heads", "smollm3_geglu", "minicpm_fatrelu")
"""On Model Runner V2 one model for each way in which they differ there: sliding windows, layers that share K/V, layers of
different K/V, GeGLU, masks."""
V2_REFUSED = ("opt", "mamba2", "mixtral")


V2_QUICK = ("llama", "gemma3n", "minicpm_fatrelu", "opt")
"""Those that `make test` runs."""


def on_v1(name):
    return pytest.param("v1", name, marks=pytest.mark.slow if name in V1_SLOW else ())


def on_v2(name):
    return pytest.param("v2", name, marks=() if name in V2_QUICK else pytest.mark.slow)


def on_runners(names, v2_names):
    """Every name on V1, some on V2."""
    return pytest.mark.parametrize(("host", "name"), [*map(on_v1, names), *map(on_v2, v2_names)], indirect=["host"])


ENGINE_OPTIONS = {"gemma4_kv_heads": {"disable_hybrid_kv_cache_manager": True}}
"""One group for all layers, although they differ in their K/V heads."""


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory):
    return tmp_path_factory.getbasetemp().parent / "tiny-models"


def engine(name, root, **options):
    base = {"model": str(build(name, root)), "max_model_len": 128, "max_num_seqs": 4}
    return {**base, **ENGINE_OPTIONS.get(name, {}), **options}


@on_runners([*GATED, *MIXED], V2_GATED)
def test_gated_model_is_drafted_and_token_identical(host, tiny_root, name):
    tiny = TINY_MODELS[name]
    plain = engine(name, tiny_root)
    reference = host.generate(plain, PROMPTS, SAMPLING).token_ids
    for options in (COARSE, FINE) if tiny.act in KNOWN_ACTIVATIONS else (COARSE,):
        sparse = {**plain, "speculative_config": options}
        found = host.generate(sparse, PROMPTS, SAMPLING)
        assert found.token_ids == reference
        assert 0 < found.num_accepted_tokens < found.num_draft_tokens
        report = host.probe(sparse, "support.probes:draft_report")
        assert report["runner"] == host.runner
        assert len(report["ffns"]) == tiny.layers
        assert report["draft_calls"] > 0
    if name in ENGINE_OPTIONS:
        assert host.probe(sparse, "support.page_probes:kv_cache_specs") == ["UniformTypeKVCacheSpecs"]


@pytest.mark.parametrize(
    ("name", "draft"),
    [
        ("llama", ("none", "int4")),
        pytest.param("gemma3n", ("coarse", "shared"), id="an-ffn-that-computes-more"),
        pytest.param("minicpm_fatrelu", ("coarse", "shared"), id="an-activation-without-a-kernel"),
    ],
)
def test_what_drafts_by_default(host, tiny_root, name, draft):
    plain = engine(name, tiny_root)
    sparse = {**plain, "speculative_config": {"method": "sirius"}}
    host.probe(sparse, "support.probes:make_drafts_pay")
    found = host.generate(sparse, PROMPTS, SAMPLING)
    assert found.token_ids == host.generate(plain, PROMPTS, SAMPLING).token_ids
    assert found.num_accepted_tokens > 0
    report = host.probe(sparse, "support.probes:draft_report")
    assert tuple(report["draft"]) == draft
    assert report["native"] == (draft[0] == "none")


@only_v1
@pytest.mark.slow
def test_a_compiled_engine_of_the_transformers_backend_drafts(host, tiny_root):
    plain = engine("smollm3_geglu", tiny_root)
    options = {**FIXED, "kernel_size": 4}
    found = host.generate({**plain, "enforce_eager": False, "speculative_config": options}, PROMPTS, SAMPLING)
    assert found.token_ids == host.generate(plain, PROMPTS, SAMPLING).token_ids
    assert found.num_accepted_tokens > 0


@on_runners(REFUSED, V2_REFUSED)
def test_other_model_is_refused_with_reason_and_remedy(host, tiny_root, name):
    reason = next((words for key, words in REFUSAL_WORDS.items() if key in TINY_MODELS[name].refusal), None)
    assert reason is not None, f"unknown refusal {TINY_MODELS[name].refusal!r}"
    options = {"runner": "pooling"} if TINY_MODELS[name].refusal == "pooling model" else {}
    with pytest.raises(EngineError) as refusal:
        host.generate(engine(name, tiny_root, speculative_config=COARSE, **options), PROMPTS, SAMPLING)
    assert "SiriusUnsupportedError" in str(refusal.value)
    assert reason in str(refusal.value)
