"""The GPU's layout and kernels in a real engine: plain shared weights, Triton interpreted (runner v2)."""

import pytest
from support.engine_host import EngineHost
from support.prompts import random_prompts
from support.tiny_models import build

PROMPTS = random_prompts(5, 17)
SAMPLING = {"max_tokens": 8, "ignore_eos": True}
LOSSLESS = {"method": "sirius", "kernel_size": 4, "adaptive": False}


@pytest.fixture(scope="module")
def gpu_host():
    with EngineHost(runner="v2") as host:
        host.probe_static("support.plain_layout:keep_ffn_weights_plain")
        yield host


def engine(name, tmp_path_factory, **options):
    root = tmp_path_factory.getbasetemp().parent / "tiny-models"
    return {"model": str(build(name, root)), "max_model_len": 64, "max_num_seqs": 2, **options}


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [
        ("llama", "coarse"),
        ("gemma2", "fine"),
        pytest.param("llama", "fine", marks=pytest.mark.slow),
        pytest.param("gemma2", "coarse", marks=pytest.mark.slow),
    ],
)
def test_drafts_share_the_targets_memory_and_lose_nothing_v2(gpu_host, tmp_path_factory, name, sparsity):
    plain = engine(name, tmp_path_factory)
    reference = gpu_host.generate(plain, PROMPTS, SAMPLING)
    before = gpu_host.probe(plain, "support.plain_layout:layout_report")
    sparse = engine(name, tmp_path_factory, speculative_config={**LOSSLESS, "sparsity": sparsity})
    found = gpu_host.generate(sparse, PROMPTS, SAMPLING)
    assert found.token_ids == reference.token_ids
    assert 0 < found.num_accepted_tokens < found.num_draft_tokens
    report = gpu_host.probe(sparse, "support.plain_layout:layout_report")
    assert report["backend"] == "TritonBackend"
    assert report["weight_bytes"] == before["weight_bytes"]
    assert report["extra_bytes"] == 0
    assert 0 < report["draft_bytes"] < report["weight_bytes"]
    assert all(report["down_is_transposed"])
    assert report["kernel_feeds_statistics"]
    assert report["draft_calls"] > 0
    assert report["energy"] > 0 or sparsity == "fine"
    costs = gpu_host.probe(sparse, "support.probes:measured_costs")
    assert {"1", "2"} <= costs["draft_seconds"].keys() & costs["target_seconds"].keys()
    assert all(seconds > 0 for curve in costs.values() for seconds in curve.values())
    # What was run for the clock alone is nobody's text.
    assert gpu_host.probe(sparse, "support.plain_layout:layout_report")["energy"] == report["energy"]


def test_the_kernels_accept_what_the_masked_draft_accepts_v2(gpu_host, tmp_path_factory):
    """Same statistics, same neurons, same drafts: native Triton kernels against the model's own masked FFNs."""
    found = {}
    for name, host in (("triton", gpu_host), ("masked", None)):
        options = engine("llama", tmp_path_factory, speculative_config=LOSSLESS)
        if host is None:
            with EngineHost({"SIRIUS_NATIVE_KERNELS": "0"}, runner="v2") as masked:
                found[name] = masked.generate(options, PROMPTS, SAMPLING)
        else:
            found[name] = host.generate(options, PROMPTS, SAMPLING)
    assert found["triton"] == found["masked"]


def test_reloaded_weights_are_drafted_with_and_weighed_anew_v2(gpu_host, tmp_path_factory):
    """Rows are views of the target's weights; the neurons' norms are derived from them."""
    sparse = engine("llama", tmp_path_factory, speculative_config={**LOSSLESS, "sparsity": "coarse"})
    root = tmp_path_factory.getbasetemp().parent / "tiny-models"
    other = {**sparse, "model": str(build("llama", root, 1))}
    expected = gpu_host.generate(other, PROMPTS, SAMPLING)
    new_norms = gpu_host.probe(other, "support.plain_layout:norms")
    assert gpu_host.generate(sparse, PROMPTS, SAMPLING).token_ids != expected.token_ids
    old_norms = gpu_host.probe(sparse, "support.plain_layout:norms")
    assert old_norms != pytest.approx(new_norms)
    gpu_host.probe(sparse, "support.copies:reload", path=other["model"])
    assert gpu_host.generate(sparse, PROMPTS, SAMPLING) == expected
    assert gpu_host.probe(sparse, "support.plain_layout:norms") == pytest.approx(new_norms)
    # Past the engine, as training frameworks do: the next draft notices it.
    gpu_host.probe(sparse, "support.plain_layout:load_ffns", path=sparse["model"])
    mixed = gpu_host.generate(sparse, PROMPTS, SAMPLING)
    assert gpu_host.probe(sparse, "support.plain_layout:norms") == pytest.approx(old_norms)
    # Weights that nothing can be drafted with do not end the engine; better ones bring the drafts back.
    gpu_host.probe(sparse, "support.plain_layout:load_ffns", path=sparse["model"], damaged=True)
    assert gpu_host.generate(sparse, PROMPTS, SAMPLING).num_accepted_tokens == 0
    gpu_host.probe(sparse, "support.plain_layout:load_ffns", path=sparse["model"])
    assert gpu_host.generate(sparse, PROMPTS, SAMPLING) == mixed
    assert mixed.num_accepted_tokens > 0
