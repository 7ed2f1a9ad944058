"""A compiled engine drafts through a compiled clone of the target, which is reduced, shares its memory and has its own key."""

import re

import pytest
from support.engine_host import EngineHost
from support.real_models import SMOL, mixed_prompts, model_path

SAMPLING = {"max_tokens": 24, "ignore_eos": True}
ENGINE = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 4}
LOSSLESS = {
    "method": "sirius",
    "kernel_size": 8,
    "adaptive": False,
    "draft_weights": "shared",
}


def test_compiled_and_eager_drafts_are_the_same_v1():
    prompts = mixed_prompts(SMOL, 4)
    found = {}
    with EngineHost() as host:
        host.probe_static("support.start_lines:listen")
        for eager in (True, False):
            engine = {**ENGINE, "enforce_eager": eager, "speculative_config": LOSSLESS}
            found[eager] = host.generate(engine, prompts, SAMPLING)
            # Compiling takes long enough to be announced, and to be told when it is over.
            lines = host.probe_static("support.start_lines:heard")
            said = [line for line in lines if re.match(r"Sirius: compile(s the draft|d the draft in [\d.]+ s$)", line)]
            assert len(said) == (0 if eager else 2)
            report = host.probe(engine, "support.probes:compiled_draft_report")
            assert report["compiled"] == (not eager)
            assert report["shared_parameters"] == report["parameters"]
        # Also at sizes that only adaptive lengths ask for at start-up.
        costs = host.probe(engine, "support.probes:measured_costs")
        assert all(seconds > 0 for curve in costs.values() for seconds in curve.values())
        # A draft that was silently dense would be accepted whole.
        assert 0 < found[False].num_accepted_tokens < 0.8 * found[False].num_draft_tokens
        assert found[False] == found[True]
        assert report["draft_key"] != report["target_key"]
        assert report["draft_ffns_run"] >= report["ffns"] * found[False].num_drafts


@pytest.mark.slow
def test_masked_drafts_are_not_compiled_v1():
    with EngineHost({"SIRIUS_NATIVE_KERNELS": "0"}) as host:
        engine = {**ENGINE, "enforce_eager": False, "speculative_config": LOSSLESS}
        found = host.generate(engine, mixed_prompts(SMOL, 2), SAMPLING)
        assert 0 < found.num_accepted_tokens < found.num_draft_tokens
        assert not host.probe(engine, "support.probes:compiled_draft_report")["compiled"]
