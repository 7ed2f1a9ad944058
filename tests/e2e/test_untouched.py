"""Plugin installed, Sirius not selected: vLLM's objects and outputs are what they are without the plugin (runner v1)."""

from support.engine_host import EngineHost
from support.real_models import SMOL, mixed_prompts, model_path

ENGINE = {"model": model_path(SMOL), "max_model_len": 512, "max_num_seqs": 4}
NGRAM = {
    **ENGINE,
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    },
}
SAMPLING = {"max_tokens": 32, "ignore_eos": True}


def test_engines_without_sirius_are_untouched_v1():
    prompts = mixed_prompts(SMOL, 4)
    seeded = {**SAMPLING, "temperature": 0.9, "seed": 3}
    found = {}
    for name, environment in (("without", {"VLLM_PLUGINS": ""}), ("with", {})):
        with EngineHost(environment) as host:
            found[name] = [
                host.probe(ENGINE, "support.probes:describe"),
                host.probe(ENGINE, "support.probes:loaded_hooks"),
                host.generate(ENGINE, prompts, SAMPLING).token_ids,
                host.generate(ENGINE, prompts, seeded).token_ids,
                host.probe(NGRAM, "support.probes:describe"),
                host.generate(NGRAM, prompts, SAMPLING).token_ids,
            ]
    hooks_without, hooks_with = found["without"].pop(1), found["with"].pop(1)
    assert found["with"] == found["without"]
    assert hooks_without == []
    assert hooks_with != []
    assert not any("rejection_sample" in hook for hook in hooks_with)
    assert found["with"][0]["runner"] == "CPUModelRunner"
    assert found["with"][0]["lookahead"] == 0
    assert not any("Sirius" in name or "Switched" in name for name in found["with"][0]["modules"])
