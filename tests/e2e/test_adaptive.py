"""Adaptive length in a real engine: never wrong, shorter where drafts fail, off where they cannot pay."""

from support.real_models import SMOL, chat_prompts, mixed_prompts, model_path
from support.runners import only_v1, only_v2

SAMPLING = {"max_tokens": 40, "ignore_eos": True}


def engine(**options):
    sirius = {"method": "sirius", "kernel_size": 16, "density": 0.3, **options}
    return {"model": model_path(SMOL), "max_model_len": 1024, "max_num_seqs": 4, "speculative_config": sirius}


@only_v1
def test_cheap_drafts_are_cut_where_they_fail(host):
    prompts = mixed_prompts(SMOL, 4)
    alone = {key: value for key, value in engine().items() if key != "speculative_config"}
    reference = host.generate(alone, prompts, SAMPLING).token_ids
    fixed = host.generate(engine(adaptive=False), prompts, SAMPLING)
    assert host.probe(engine(), "support.probes:fix_costs", draft=0.2)["draft_seconds"] == {"1": 0.2, "32": 0.2}
    adaptive = host.generate(engine(), prompts, SAMPLING)
    assert adaptive.token_ids == fixed.token_ids == reference
    wasted, wasted_adaptive = (run.num_draft_tokens - run.num_accepted_tokens for run in (fixed, adaptive))
    assert wasted_adaptive < 0.5 * wasted
    # Nearly as many tokens per pass all the same.
    assert adaptive.acceptance_length > 0.6 * fixed.acceptance_length > 1.0


@only_v1
def test_drafts_that_cost_a_target_step_are_not_made(host):
    prompts = chat_prompts(SMOL, "gsm8k", 2)
    alone = {key: value for key, value in engine().items() if key != "speculative_config"}
    reference = host.generate(alone, prompts, SAMPLING).token_ids
    host.probe(engine(), "support.probes:fix_costs", draft=1.0)
    found = host.generate(engine(), prompts, SAMPLING)
    assert found.token_ids == reference
    # Steps 2, 6, 14 and 30 try a few tokens each, to see whether it is true.
    assert found.num_drafts <= 4 * len(prompts)
    assert found.num_draft_tokens <= 4 * found.num_drafts


@only_v1
def test_costs_are_measured_and_can_be_asked_for(host):
    costs = host.probe(engine(), "support.probes:measured_costs")
    # Passes beyond a long one are not measured.
    sizes = sorted(map(int, costs["target_seconds"]))
    assert sizes == [1, 2, 4, 8, 16, 32, 64][: max(len(sizes), 3)]
    # Four requests, each with up to seven candidates.
    sizes = sorted(map(int, costs["draft_seconds"]))
    assert sizes == [1, 2, 4, 5, 8, 9, 16, 17, 32][: max(len(sizes), 3)]
    plain = host.probe(engine(prompt_lookup_tokens=0), "support.probes:measured_costs")
    assert sorted(map(int, plain["draft_seconds"])) == [1, 2, 4]
    assert all(0 < seconds < 10 for curve in costs.values() for seconds in curve.values())
    largest = max(costs["target_seconds"], key=int)
    assert costs["target_seconds"][largest] > costs["target_seconds"]["1"]


@only_v2
def test_the_scheduler_chooses_a_length_for_the_batch(host, subject):
    prompts = subject.mixed_prompts(2)
    alone = {"model": subject.model, "max_model_len": 512, "max_num_seqs": 2}
    by_batch = {**alone, "speculative_config": {"method": "sirius", "kernel_size": 8, "sparsity": "coarse"}}
    reference = host.generate(alone, prompts, SAMPLING).token_ids
    found = host.generate(by_batch, prompts, SAMPLING)
    assert found.token_ids == reference
    # Some steps are spent on measuring lengths of 0 and 7, so drafts are shorter than 7 on average.
    assert 0 < found.num_draft_tokens < 7 * found.num_drafts
    report = host.probe(by_batch, "support.probes:lengths_by_batch")
    assert report["scheduler"] == "SiriusScheduler"
    assert {"0", "7"} <= set(report["seconds"]["1"])
    assert all(seconds > 0 for load in report["seconds"].values() for seconds in load.values())
