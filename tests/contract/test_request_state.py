"""Model Runner V2's request state, pass by pass: whose rows count, and what a verdict teaches (`test_proposer` has V1's)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams

from vllm_sirius.config import SiriusConfig
from vllm_sirius.drafting.device_batch import DraftTable
from vllm_sirius.integration.runner_v2.request_state import SiriusRequestState
from vllm_sirius.sparsity.statistics import NeuronStatistics

NEURONS, SLOTS = 8, 3
CPU = torch.device("cpu")


def make(**options: Any) -> tuple[SiriusRequestState, NeuronStatistics]:
    config = SiriusConfig(sparsity="coarse", draft_weights="shared", kernel_size=4, **options)
    statistics = NeuronStatistics([NEURONS], SLOTS, 16, CPU)
    longest = SimpleNamespace(max_model_len=64)
    return SiriusRequestState(config, DraftTable(SLOTS, CPU), statistics, longest), statistics


def admit(state: SiriusRequestState, slot: int, prompt_len: int, cached: int = 0, **sampling: Any) -> None:
    params = SamplingParams(temperature=0.0, **{"max_tokens": 20, **sampling})
    state.add_request(slot, SimpleNamespace(sampling_params=params, prompt_len=prompt_len, num_computed_tokens=cached))


def batch(*rows: tuple[int, int, int, int]) -> Any:
    """A batch of (slot, tokens of this pass, tokens that its prefill has, tokens of it that were computed before)."""
    slots, counts, lengths, computed = (np.array(column) for column in zip(*rows, strict=True))
    return SimpleNamespace(
        num_reqs=len(rows),
        idx_mapping=torch.tensor(slots),
        idx_mapping_np=slots,
        num_scheduled_tokens=counts,
        is_prefilling_np=computed < lengths,
        prefill_len_np=lengths,
        num_computed_prefill_tokens_np=computed,
        query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]),
    )


def run(state: SiriusRequestState, statistics: NeuronStatistics, rows: Any, sampled: list[int]) -> None:
    """A pass in which row i of the batch shows neuron i."""
    state.begin_pass(rows)
    statistics.observe(0, torch.eye(int(rows.num_scheduled_tokens.sum()), NEURONS))
    state.end_pass(rows, torch.tensor(sampled, dtype=torch.int32))


def seen(statistics: NeuronStatistics, slot: int) -> list[int]:
    return (statistics.energy[slot] > 0).nonzero().flatten().tolist()


def test_accepted_rows_count_and_rejected_ones_do_not() -> None:
    state, statistics = make()
    for slot in (2, 0):
        admit(state, slot, 1)
    # Two drafts of three tokens: one of the first and all of the second are kept.
    run(state, statistics, batch((2, 4, 1, 1), (0, 4, 1, 1)), [2, 4])
    assert seen(statistics, 2) == [0, 1]
    assert seen(statistics, 0) == [4, 5, 6, 7]
    assert seen(statistics, 1) == []


def test_rows_of_a_prompt_count_at_once_and_those_of_its_padding_do_not() -> None:
    state, statistics = make()
    admit(state, 1, 5)
    run(state, statistics, batch((1, 3, 5, 0)), [0])
    assert seen(statistics, 1) == [0, 1, 2]
    state, statistics = make()
    admit(state, 1, 3)
    run(state, statistics, batch((1, 4, 3, 0)), [1])
    assert seen(statistics, 1) == [0, 1, 2]


def test_neurons_fixed_after_the_prompt_take_nothing_in() -> None:
    state, statistics = make(refresh=False)
    admit(state, 1, 1)
    run(state, statistics, batch((1, 4, 1, 1)), [4])
    assert seen(statistics, 1) == []


def test_the_prior_learns_from_complete_prompts_alone() -> None:
    state, statistics = make()
    admit(state, 1, 4)
    before = statistics.prior.clone()
    run(state, statistics, batch((1, 2, 4, 0)), [0])
    assert torch.equal(statistics.prior, before)
    run(state, statistics, batch((1, 2, 4, 2)), [1])
    assert not torch.equal(statistics.prior, before)
    learnt = statistics.prior.clone()
    run(state, statistics, batch((1, 4, 4, 4)), [4])
    assert torch.equal(statistics.prior, learnt)


def test_a_new_request_in_a_slot_knows_nothing_of_the_last_one() -> None:
    state, statistics = make()
    admit(state, 1, 1)
    run(state, statistics, batch((1, 4, 1, 1)), [4])
    admit(state, 1, 2)
    assert seen(statistics, 1) == []
    # Tokens out of the prefix cache are never run: the prior stands for them.
    admit(state, 1, 40, cached=32)
    assert len(seen(statistics, 1)) == NEURONS


def test_a_pass_for_nobody_leaves_no_trace() -> None:
    state, statistics = make()
    admit(state, 1, 1)
    state.begin_pass(batch((1, 4, 1, 1)))
    state.begin_dummy_pass()
    assert not statistics.observing


def test_what_a_request_may_do_reaches_the_table() -> None:
    state, _ = make(acceptance="threshold")
    admit(state, 0, 10, stop_token_ids=[7], extra_args={"sirius_threshold": 0.25})
    admit(state, 1, 10, extra_args={"sirius": "off"})
    assert state.table.last_position.tolist() == [28, -1, state.table.last_position[2].item()]
    assert state.table.end_token_ids[0].tolist()[:2] == [7, -1]
    assert state.table.thresholds[0].item() == 0.25
