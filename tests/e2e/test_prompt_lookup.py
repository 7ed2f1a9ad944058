"""Prompt lookup in a real engine (runner v1): the same drafts and the same text in fewer draft steps, whatever the batch."""

import pytest
from support.lossless import sirius
from support.real_models import SMOL, mixed_prompts, model_path
from support.runners import only_v1

pytestmark = only_v1

SAMPLING = {"max_tokens": 32, "ignore_eos": True}
DRAFTS = {
    "coarse": {"density": 0.7},
    "fine": {"sparsity": "fine"},
    "int4": {"draft_weights": "int4", "sparsity": "none"},
}


QUICK = {("int4", 4)}
"""What `make test` runs."""

CASES = [
    pytest.param(draft, batch, marks=() if (draft, batch) in QUICK else pytest.mark.slow)
    for draft in DRAFTS
    for batch in (1, 4)
]


@pytest.mark.parametrize(("draft", "batch"), CASES)
def test_prompt_lookup_changes_nothing_but_the_number_of_draft_steps(host, draft, batch):
    prompts = mixed_prompts(SMOL, 3)
    base = {"model": model_path(SMOL), "max_model_len": 1024, "max_num_seqs": batch}
    reference = host.generate(base, prompts, SAMPLING).token_ids
    runs, steps = [], []
    for most in (0, 7):
        engine = {**base, "speculative_config": sirius(prompt_lookup_tokens=most, **DRAFTS[draft])}
        if most:
            host.probe(engine, "support.probes:fix_prompt_lookup", most=most)
        before = host.probe(engine, "support.probes:draft_report")["draft_calls"]
        runs.append(host.generate(engine, prompts, SAMPLING))
        steps.append(host.probe(engine, "support.probes:draft_report")["draft_calls"] - before)
    plain, looking_up = runs
    assert plain.token_ids == looking_up.token_ids == reference
    # A step of several tokens adds up in another order: a draft token may differ here and there.
    assert looking_up.num_draft_tokens == pytest.approx(plain.num_draft_tokens, rel=0.1)
    assert looking_up.num_accepted_tokens == pytest.approx(plain.num_accepted_tokens, rel=0.1)
    assert looking_up.num_accepted_tokens > 0
    # A batch takes as many steps as its slowest row.
    assert 0 < steps[1] <= (0.9 if batch == 1 else 1.02) * steps[0]
