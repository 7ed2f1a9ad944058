"""Acceptance lengths on real prompts: a floor for each configuration, and the same length on both model runners.

The floors of the 1.5B model are the project's bars; those of the small models are regression floors a tenth below what was
measured when they were written.
"""

import pytest
from support.engine_host import EngineHost
from support.real_models import QWEN_LARGE, QWEN_SMALL, SMOL, chat_prompts, model_path
from support.runners import RUNNERS, only_v1

NUM_PROMPTS = 12
KERNEL = 16


def acceptance_length(host, name, task, num_prompts, options, max_tokens=128, batch=1):
    engine = {
        "model": model_path(name),
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": batch,
        "speculative_config": {
            "method": "sirius",
            "kernel_size": KERNEL,
            "threshold": 0.1,
            "adaptive": False,
            "draft_weights": "shared",
            **options,
        },
    }
    found = host.generate(engine, chat_prompts(name, task, num_prompts), {"max_tokens": max_tokens})
    print(f"acceptance length {name} {task} {options}: {found.acceptance_length:.2f} of {KERNEL}")
    return found.acceptance_length


@pytest.mark.slow
@pytest.mark.parametrize("task", ["gsm8k", "humaneval"])
@pytest.mark.parametrize(
    ("options", "floor"),
    [({}, 10.5), ({"sparsity": "fine"}, 14.0), ({"refresh": False}, 4.0)],
    ids=["coarse-refreshed", "fine", "coarse-as-in-the-paper"],
)
def test_qwen_large_v1(task, options, floor):
    batch = 4 if options.get("sparsity") == "fine" else 1
    with EngineHost() as host:  # ends with the test: a process keeps part of each engine's memory, here gigabytes
        assert acceptance_length(host, QWEN_LARGE, task, NUM_PROMPTS, options, batch=batch) >= floor


@only_v1
@pytest.mark.slow
def test_refresh_and_fine_sparsity_lengthen_acceptance(host):
    paper = acceptance_length(host, QWEN_SMALL, "gsm8k", 2, {"refresh": False}, max_tokens=64)
    refreshed = acceptance_length(host, QWEN_SMALL, "gsm8k", 2, {}, max_tokens=64)
    fine = acceptance_length(host, QWEN_SMALL, "gsm8k", 2, {"sparsity": "fine"}, max_tokens=64)
    assert 1.0 < paper < refreshed < fine <= KERNEL


PARITY = [
    pytest.param({"refresh": True}, id="coarse"),
    pytest.param({}, id="coarse-as-in-the-paper"),
    pytest.param({"sparsity": "fine", "density": 0.3}, id="fine"),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", PARITY)
def test_acceptance_is_as_long_on_v2_as_on_v1(options):
    """Tokens per pass of one request at a time, counted alike on both: vLLM's counters differ between the runners."""
    prompts = chat_prompts(SMOL, "gsm8k", 1)
    sampling = {"max_tokens": 40, "ignore_eos": True}
    sirius = {"method": "sirius", "preset": "paper", **options}
    engine = {"model": model_path(SMOL), "max_num_seqs": 1, "speculative_config": sirius}
    lengths = {}
    for runner in RUNNERS:
        with EngineHost(runner=runner) as host:
            counted = host.probe(engine, "support.probes:count_passes", prompts=prompts, sampling=sampling)
        lengths[runner] = counted["tokens"] / counted["passes"]
        print(f"acceptance length {SMOL} {options} on {runner}: {lengths[runner]:.3f} of {KERNEL}")
    assert 1.0 < lengths["v1"] < KERNEL
    assert lengths["v2"] == pytest.approx(lengths["v1"], rel=0.02)
