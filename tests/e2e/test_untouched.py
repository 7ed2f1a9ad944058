"""Plugin installed, Sirius not selected: vLLM's objects and outputs are what they are without the plugin."""

import os

import pytest
from support.engine_host import EngineHost
from support.real_models import SMOL, mixed_prompts, model_path

ENGINE = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 4}
OTHER_METHOD = {
    "v1": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "v2": {"method": "draft_model", "model": model_path(SMOL), "num_speculative_tokens": 3},
}
"""On V2 a method that has a speculator, which Sirius's hook stands in front of."""
SAMPLING = {"max_tokens": 16, "ignore_eos": True}


def observe(host):
    prompts = mixed_prompts(SMOL, 4)
    speculative = {**ENGINE, "speculative_config": OTHER_METHOD[host.runner]}
    return {
        "engine": host.probe(ENGINE, "support.probes:describe"),
        "hooks": host.probe(ENGINE, "support.probes:loaded_hooks"),
        "greedy": host.generate(ENGINE, prompts, SAMPLING).token_ids,
        "seeded": host.generate(ENGINE, prompts, {**SAMPLING, "temperature": 0.9, "seed": 3}).token_ids,
        "speculative engine": host.probe(speculative, "support.probes:describe"),
        "speculative": host.generate(speculative, prompts, SAMPLING).token_ids,
    }


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_engines_without_sirius_are_untouched(runner):
    found = {}
    for name, environment in (("without", {"VLLM_PLUGINS": ""}), ("with", {})):
        with EngineHost(environment, runner=runner) as host:
            found[name] = observe(host)
    hooks = {name: observed.pop("hooks") for name, observed in found.items()}
    assert found["with"] == found["without"]
    assert hooks["without"] == []
    # On a vLLM with the source patches the plugin needs no hook.
    assert (hooks["with"] == []) == ("SIRIUS_PATCHED_COPY" in os.environ)
    assert not any("rejection_sample" in hook for hook in hooks["with"])
    plain = found["with"]["engine"]
    assert plain["runner"] == "CPUModelRunner"
    assert (".gpu." in plain["runner_module"] or ".cpu." in plain["runner_module"]) == (runner == "v2")
    assert plain["lookahead"] == 0
    assert not any("Sirius" in name or "Switched" in name for name in plain["modules"])
    assert found["with"]["speculative engine"]["parts"] != plain["parts"]
