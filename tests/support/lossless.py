"""Token-identity with vLLM without the plugin, the check that several files of end-to-end tests make."""

from __future__ import annotations

from support.real_models import mixed_prompts, model_path

MAX_TOKENS = 24

DEFAULT = {"method": "sirius"}
"""What a user gets who asks for nothing else."""

ON_CPU = {
    "sparsity": "none",
    "draft_weights": "int4",
    "acceptance": "lossless",
    "kernel_size": 16,
    "adaptive": True,
    "prompt_lookup_tokens": 7,
}
"""What that comes to in the tests: copies in four bits of all neurons, adaptive lengths, prompt lookup."""


def sirius(**options):
    """Drafts of fixed length on shared weights, for tests that count them or that need poor drafts."""
    return {"method": "sirius", "kernel_size": 8, "adaptive": False, "draft_weights": "shared", **options}


def generate_by_default(host, engine, prompts, sampling, **options):
    """Answers of the default path, of which drafts and looked-up candidates were part."""
    engine = {**engine, "speculative_config": {**DEFAULT, **options}}
    assert host.probe(engine, "support.probes:make_drafts_pay") == {**ON_CPU, **options}
    found = host.generate(engine, prompts, sampling)
    assert 0 < found.num_accepted_tokens <= found.num_draft_tokens
    if host.runner == "v1":
        assert host.probe(engine, "support.probes:candidates_taken") > 0
    return found


def check_identical(host, name, batch, options, num_prompts, **engine):
    """Checks greedy answers, on the default path where `options` is ``None``."""
    prompts = mixed_prompts(name, num_prompts)
    sampling = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    base = {"model": model_path(name), "max_model_len": 1024, "max_num_seqs": batch, **engine}
    key = (host.runner, name, num_prompts, tuple(sorted(engine.items())))
    if key not in check_identical.references:
        check_identical.references[key] = host.generate({**base, "max_num_seqs": 8}, prompts, sampling).token_ids
    if options is None:
        found = generate_by_default(host, base, prompts, sampling)
    else:
        found = host.generate({**base, "speculative_config": sirius(**options)}, prompts, sampling)
    assert found.token_ids == check_identical.references[key]
    assert found.num_drafts > 0
    assert 0 < found.num_accepted_tokens < found.num_draft_tokens


check_identical.references = {}
