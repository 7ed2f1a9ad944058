"""Acceptance lengths on real prompts: a floor for each configuration (runner v1).

The floors of the 1.5B model are the project's bars; those of the small models are regression floors a tenth below what was
measured when they were written.
"""

import pytest
from support.real_models import QWEN_LARGE, QWEN_SMALL, chat_prompts, model_path

NUM_PROMPTS = 12


def acceptance_length(host, name, task, num_prompts, options, max_tokens=128, batch=1):
    engine = {
        "model": model_path(name),
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": batch,
        "speculative_config": {"method": "sirius", "kernel_size": 16, "threshold": 0.1, "adaptive": False, **options},
    }
    found = host.generate(engine, chat_prompts(name, task, num_prompts), {"max_tokens": max_tokens})
    print(f"acceptance length {name} {task} {options}: {found.acceptance_length:.2f} of 16")
    return found.acceptance_length


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gsm8k", "humaneval"])
@pytest.mark.parametrize(
    ("options", "floor"),
    [({}, 10.5), ({"sparsity": "fine"}, 14.0), ({"refresh": False}, 4.0)],
    ids=["v1-coarse-refreshed", "v1-fine", "v1-coarse-as-in-the-paper"],
)
def test_qwen_large(host, task, options, floor):
    batch = 4 if options.get("sparsity") == "fine" else 1
    assert acceptance_length(host, QWEN_LARGE, task, NUM_PROMPTS, options, batch=batch) >= floor


def test_refresh_and_fine_sparsity_lengthen_acceptance_v1(host):
    paper = acceptance_length(host, QWEN_SMALL, "gsm8k", 4, {"refresh": False}, max_tokens=64)
    refreshed = acceptance_length(host, QWEN_SMALL, "gsm8k", 4, {}, max_tokens=64)
    fine = acceptance_length(host, QWEN_SMALL, "gsm8k", 4, {"sparsity": "fine"}, max_tokens=64)
    assert 1.0 < paper < refreshed < fine <= 16.0


def test_adaptive_length_wastes_fewer_drafts_v1(host):
    prompts = chat_prompts(QWEN_SMALL, "gsm8k", 2)
    waste = {}
    for adaptive in (False, True):
        engine = {
            "model": model_path(QWEN_SMALL),
            "dtype": "bfloat16",
            "max_num_seqs": 1,
            "speculative_config": {"method": "sirius", "density": 0.3, "acceptance": "lossless", "adaptive": adaptive},
        }
        found = host.generate(engine, prompts, {"max_tokens": 48, "ignore_eos": True})
        waste[adaptive] = found.num_draft_tokens - found.num_accepted_tokens
    assert waste[True] < 0.7 * waste[False]
