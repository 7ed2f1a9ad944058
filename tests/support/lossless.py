"""Token-identity with vLLM without the plugin, the check that several files of end-to-end tests make."""

from __future__ import annotations

from support.real_models import mixed_prompts, model_path

MAX_TOKENS = 24


def sirius(**options):
    return {
        "method": "sirius",
        "kernel_size": 8,
        "adaptive": False,
        "draft_weights": "shared",
        **options,
    }


def check_identical(host, name, batch, options, num_prompts, **engine):
    prompts = mixed_prompts(name, num_prompts)
    sampling = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    base = {"model": model_path(name), "max_model_len": 1024, "max_num_seqs": batch, **engine}
    key = (host.runner, name, num_prompts, tuple(sorted(engine.items())))
    if key not in check_identical.references:
        check_identical.references[key] = host.generate({**base, "max_num_seqs": 8}, prompts, sampling).token_ids
    found = host.generate({**base, "speculative_config": sirius(**options)}, prompts, sampling)
    assert found.token_ids == check_identical.references[key]
    assert found.num_drafts > 0
    assert 0 < found.num_accepted_tokens < found.num_draft_tokens


check_identical.references = {}
