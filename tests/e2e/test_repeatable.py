"""Answers of the default engine do not depend on time, company, drafts or chunks, in bfloat16 too (runner v1)."""

import pytest
import torch
from support.engine_host import EngineHost
from support.real_models import SMOL, mixed_prompts, model_path

from vllm_sirius.kernels.cpu.panel_linear import has_panels

pytestmark = pytest.mark.skipif(
    not has_panels() or torch.cpu._is_amx_tile_supported(),
    reason="promised where the target runs on Sirius's kernel: AVX-512 without AMX",
)

ENGINE = {
    "model": model_path(SMOL),
    "dtype": "bfloat16",
    "max_model_len": 512,
    "max_num_seqs": 4,
    "speculative_config": {"method": "sirius"},
}
SAMPLINGS = [
    {"max_tokens": 32, "ignore_eos": True},
    {"max_tokens": 32, "ignore_eos": True, "temperature": 0.8, "seed": 7},
]
OFF = {"extra_args": {"sirius": "off"}}


@pytest.fixture(scope="module")
def v1():
    with EngineHost() as host:
        yield host


def answers(host, engine, requests):
    """Answers to (prompt, sampling) pairs that are sent together."""
    prompts, samplings = zip(*requests, strict=True)
    return host.generate(engine, list(prompts), list(samplings))


def test_answers_do_not_depend_on_company_drafts_time_or_chunks_v1(v1):
    requests = [(prompt, sampling) for prompt in mixed_prompts(SMOL, 3) for sampling in SAMPLINGS]
    first = answers(v1, ENGINE, requests)
    assert first.num_accepted_tokens > 0
    expected = first.token_ids
    # The prompts come from the prefix cache now, and the draft lengths follow other measurements.
    assert answers(v1, ENGINE, requests[::-1]).token_ids == expected[::-1]
    assert [answers(v1, ENGINE, [request]).token_ids[0] for request in requests] == expected
    off = answers(v1, ENGINE, [(prompt, {**sampling, **OFF}) for prompt, sampling in requests])
    assert off.num_draft_tokens == 0
    assert off.token_ids == expected
    # Prompts in chunks: a sample is thrown away with each, which must not move the numbers of a seeded request.
    chunks = {**ENGINE, "max_num_batched_tokens": 48, "enable_prefix_caching": False}
    assert answers(v1, chunks, requests).token_ids == expected
