"""A compiled engine drafts through a compiled clone of the target, which is reduced, shares its memory and has its own key."""

import re

import pytest
from support.engine_host import EngineHost
from support.prompts import random_prompts
from support.real_models import SMOL, mixed_prompts, model_path
from support.subjects import smollm2, tiny
from support.tiny_models import build

ANNOUNCED = re.compile(r"Sirius: compile(s the draft|d the draft in [\d.]+ s$)")
SAMPLING = {"max_tokens": 24, "ignore_eos": True}
ENGINE = {"max_model_len": 512, "max_num_seqs": 4}
LOSSLESS = {
    "method": "sirius",
    "kernel_size": 8,
    "adaptive": False,
    "draft_weights": "shared",
}


@pytest.mark.parametrize("model", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_compiled_and_eager_drafts_are_the_same_v1(model, tiny_model):
    """SmolLM2 takes minutes to compile on one core."""
    subject = tiny(tiny_model("llama")) if model == "tiny" else smollm2()
    prompts = subject.mixed_prompts(4)
    compiled, eager = (
        {**ENGINE, "model": subject.model, "enforce_eager": eager, "speculative_config": LOSSLESS}
        for eager in (False, True)
    )
    found = {}
    with EngineHost() as host:
        host.probe_static("support.start_lines:listen")
        found[False] = host.generate(compiled, prompts, SAMPLING)
        # Compiling takes long enough to be announced, and to be told when it is over.
        lines = host.probe_static("support.start_lines:heard")
        assert len([line for line in lines if ANNOUNCED.match(line)]) == 2
        report = host.probe(compiled, "support.probes:compiled_draft_report")
        assert report["compiled"]
        assert report["shared_parameters"] == report["parameters"]
        # Also at sizes that only adaptive lengths ask for at start-up.
        costs = host.probe(compiled, "support.probes:measured_costs")
        assert all(seconds > 0 for curve in costs.values() for seconds in curve.values())
        assert "copies" in host.probe(compiled, "support.probes:watch_memory")
        found[True] = host.generate(eager, prompts, SAMPLING)
        lines = host.probe_static("support.start_lines:heard")
        assert not any(ANNOUNCED.match(line) for line in lines)
        assert not host.probe(eager, "support.probes:compiled_draft_report")["compiled"]
        # Another engine in the same process: nothing of the first one is left.
        assert host.probe_static("support.probes:watched_and_alive") == []
        # A draft that was silently dense would be accepted whole.
        assert 0 < found[False].num_accepted_tokens < 0.8 * found[False].num_draft_tokens
        assert found[False] == found[True]
        assert report["draft_key"] != report["target_key"]
        assert report["draft_ffns_run"] >= report["ffns"] * found[False].num_drafts


@pytest.mark.slow
def test_kept_graphs_serve_every_engine_that_they_fit_and_no_other_v1(tmp_path):
    """vLLM keeps graphs on disk and loads them unseen, also in another process and beside those of other engines."""
    model, prompts = str(build("llama", tmp_path)), random_prompts(20, 9)
    whole, coarse = {}, {"sparsity": "coarse", "draft_weights_scope": "ffn"}
    common = {"method": "sirius", "kernel_size": 8, "adaptive": False, "prompt_lookup_tokens": 0}
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}

    def serve(host, options):
        engine = {
            "model": model,
            "max_model_len": 128,
            "max_num_seqs": 4,
            "enforce_eager": False,
            "speculative_config": {**common, **options},
        }
        found = host.generate(engine, prompts, SAMPLING)
        report = host.probe(engine, "support.probes:compiled_draft_report")
        assert report["compiled"]
        # A draft that ran on another engine's switch would not be counted by this one's.
        assert report["draft_ffns_run"] >= report["ffns"] * found.num_drafts > 0
        return found, report["kept_graphs"]

    with EngineHost(cache) as host:
        host.probe_static("support.probes:load_kept_graphs")
        first, kept = serve(host, whole)
        assert kept == [False, False]
        reduced, kept = serve(host, coarse)
        assert kept == [False, False]
        assert reduced.token_ids == first.token_ids
        assert serve(host, whole) == (first, [True, True])
    with EngineHost(cache) as host:
        host.probe_static("support.probes:load_kept_graphs")
        # Here it is the first engine, and observes what it reads.
        assert serve(host, coarse) == (reduced, [True, True])


@pytest.mark.slow
def test_masked_drafts_are_not_compiled_v1():
    with EngineHost({"SIRIUS_NATIVE_KERNELS": "0"}) as host:
        engine = {**ENGINE, "model": model_path(SMOL), "enforce_eager": False, "speculative_config": LOSSLESS}
        found = host.generate(engine, mixed_prompts(SMOL, 2), SAMPLING)
        assert 0 < found.num_accepted_tokens < found.num_draft_tokens
        assert not host.probe(engine, "support.probes:compiled_draft_report")["compiled"]
