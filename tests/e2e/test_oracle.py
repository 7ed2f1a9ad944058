"""The plugin against the paper's algorithm in plain PyTorch: same tokens, same acceptance lengths (fp32, runner v1)."""

import pytest
from reference.oracle import load_oracle
from support.real_models import QWEN_SMALL, SMOL, chat_prompts, model_path
from support.runners import only_v1

MAX_TOKENS = 48
FEW_TOKENS = 32


def check_matches_oracle(host, name, kernel_size, num_prompts, max_tokens=MAX_TOKENS):
    prompts = chat_prompts(name, "gsm8k", num_prompts // 2) + chat_prompts(
        name, "humaneval", num_prompts - num_prompts // 2
    )
    oracle = load_oracle(model_path(name), density=0.5)
    engine = {
        "model": model_path(name),
        "max_model_len": 1024,
        "max_num_seqs": 1,
        "speculative_config": {"method": "sirius", "preset": "paper", "kernel_size": kernel_size},
    }
    for prompt in prompts:
        expected = oracle.generate(
            prompt, kernel_size=kernel_size, max_tokens=max_tokens, threshold=0.1, ignore_eos=True
        )
        found = host.generate(engine, [prompt], {"max_tokens": max_tokens, "ignore_eos": True})
        assert found.token_ids[0] == list(expected.token_ids)
        drafted = [n for n in expected.num_drafted if n]
        lengths = [length for length, n in zip(expected.acceptance_lengths, expected.num_drafted, strict=True) if n]
        assert found.num_drafts == len(drafted)
        assert found.num_draft_tokens == sum(drafted)
        assert found.num_accepted_tokens == sum(lengths) - len(lengths)
        assert found.acceptance_length == pytest.approx(expected.acceptance_length)


@only_v1
@pytest.mark.parametrize("kernel_size", [16])
def test_smollm2_in_short(host, kernel_size):
    check_matches_oracle(host, SMOL, kernel_size, num_prompts=1, max_tokens=FEW_TOKENS)


@only_v1
@pytest.mark.slow
@pytest.mark.parametrize("kernel_size", [8, 16])
@pytest.mark.parametrize("name", [SMOL, QWEN_SMALL])
def test_twenty_prompts(host, name, kernel_size):
    check_matches_oracle(host, name, kernel_size, num_prompts=20)
