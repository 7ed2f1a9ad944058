"""Model Runner V1's request table and proposer, step by step: whose rows count, who drafts, and what a verdict teaches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_sirius.config import SiriusConfig
from vllm_sirius.integration.runner_v1.proposer import SiriusProposer, VerifiedStep
from vllm_sirius.integration.runner_v1.request_table import RequestTable
from vllm_sirius.integration.speculative_config import SiriusSpeculativeConfig
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.sparsity.observation import ObservedRows
from vllm_sirius.sparsity.statistics import NeuronStatistics

CONFIG = SiriusConfig(sparsity="coarse", draft_weights="shared", kernel_size=4, adaptive=False, prompt_lookup_tokens=0)
NEURONS = 8
SLOTS = 2
VOCABULARY = 32
LONGEST_TEXT = 64


def statistics() -> NeuronStatistics:
    return NeuronStatistics([NEURONS], SLOTS, 16, torch.device("cpu"))


def state(req_id: str, prompt: list[int], **sampling: Any) -> CachedRequestState:
    params = SamplingParams(temperature=0.0, **{"max_tokens": 20, **sampling})
    return CachedRequestState(req_id, prompt, [], params, None, ([1],), 0, [])


def schedule(tokens: dict[str, int], drafted: dict[str, list[int]] | None = None, resumed: Any = ()) -> SchedulerOutput:
    """A step of vLLM's scheduler: how many tokens of each request run, and the drafts that they hold."""
    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = tokens
    step.scheduled_spec_decode_tokens = drafted or {}
    step.scheduled_cached_reqs.resumed_req_ids.update(resumed)
    return step


class Engine:
    """A proposer with requests, and a draft that says the successor of each token."""

    def __init__(self, config: SiriusConfig = CONFIG) -> None:
        speculative = object.__new__(SiriusSpeculativeConfig)
        speculative.sirius = config
        model = SimpleNamespace(max_model_len=LONGEST_TEXT)
        self.proposer = SiriusProposer(SimpleNamespace(speculative_config=speculative, model_config=model))
        self.statistics = self.proposer.statistics = statistics()
        self.proposer.requests = RequestTable(config, self.statistics)
        self.states: dict[str, CachedRequestState] = {}
        self.rows_run: list[list[int]] = []

    def forward(self, rows: list[int], counts: list[int], token_ids: torch.Tensor, positions: torch.Tensor) -> Any:
        self.rows_run.append(rows)
        return torch.nn.functional.one_hot((token_ids.long() + 1) % VOCABULARY, VOCABULARY) * 20.0

    def run(
        self, step: SchedulerOutput, emitted: dict[str, list[int]], activation: torch.Tensor | None = None
    ) -> dict[str, list[int]]:
        """Verifies and drafts; the requests of the step stand in the batch in its order.

        Args:
            step: The step.
            emitted: What the target says of each request.
            activation: What the target's pass shows the statistics, ``[rows, NEURONS]``.
        """
        req_ids = list(step.num_scheduled_tokens)
        self.proposer.begin_pass(step, self.states, req_ids)
        if activation is not None:
            self.statistics.observe(0, activation)
        for req_id in req_ids:
            request = self.states[req_id]
            judged = len(step.scheduled_spec_decode_tokens.get(req_id, ()))
            request.num_computed_tokens += step.num_scheduled_tokens[req_id] - judged
            request.output_token_ids.extend(emitted[req_id])
        texts = [self.states[r].prompt_token_ids + self.states[r].output_token_ids for r in req_ids]
        token_ids = np.zeros((len(texts), LONGEST_TEXT), dtype=np.int32)
        for row, text in enumerate(texts):
            token_ids[row, : len(text)] = text
        sampled = [emitted[req_id] for req_id in req_ids]
        verified = VerifiedStep(
            req_ids, sampled, np.array([len(text) for text in texts]), token_ids, self.proposer.config.kernel_size - 1
        )
        return dict(zip(req_ids, self.proposer.propose(verified, self.forward), strict=True))


def test_a_request_keeps_its_slot_wherever_its_row_goes_and_gives_it_back() -> None:
    table = RequestTable(CONFIG, statistics())
    states = {name: state(name, [1, 2, 3]) for name in "abc"}
    new = table.follow(schedule({"a": 3, "b": 3, "c": 3}), states, ["a", "b", "c"])
    assert [request is table[name] for request, name in zip(new, "abc", strict=True)] == [True] * 3
    slots = table.slots(["a", "b", "c"]).tolist()
    # The third finds no room: it is drafted for, with what all requests have in common.
    assert slots[2] == SLOTS
    assert sorted(slots[:2]) == [0, 1]
    assert table.follow(schedule({"b": 1, "a": 1}), states, ["b", "a"]) == []
    assert table.slots(["b", "a"]).tolist() == [slots[1], slots[0]]
    del states["a"]
    states["d"] = state("d", [4])
    table.follow(schedule({"b": 1, "d": 1}), states, ["b", "d"])
    assert table.slots(["d"]).tolist() == [slots[0]]
    assert len(table) == 3


def test_rows_of_prompts_count_at_once_and_those_of_drafts_once_they_are_accepted() -> None:
    table = RequestTable(CONFIG, statistics())
    states = {"a": state("a", list(range(5))), "b": state("b", [7, 8])}
    step = schedule({"a": 5, "b": 2})
    table.follow(step, states, ["a", "b"])
    first, second = table.slots(["a", "b"]).tolist()
    assert table.observed_rows(step, states, ["a", "b"]) == [
        ObservedRows(first, 0, 5, False),
        ObservedRows(second, 5, 2, False),
    ]
    states["a"].num_computed_tokens = 5
    states["b"].num_computed_tokens = 1
    step = schedule({"b": 1, "a": 4}, {"a": [1, 2, 3]})
    table.follow(step, states, ["b", "a"])
    assert table["a"].num_drafted == 3
    assert table["b"].num_drafted == 0
    assert table.observed_rows(step, states, ["b", "a"]) == [
        ObservedRows(second, 0, 1, False),
        ObservedRows(first, 1, 4, True),
    ]


def test_neurons_fixed_after_the_prompt_are_not_refreshed() -> None:
    table = RequestTable(SiriusConfig(sparsity="coarse", draft_weights="shared", refresh=False), statistics())
    states = {"a": state("a", [1, 2])}
    table.follow(schedule({"a": 2}), states, ["a"])
    states["a"].num_computed_tokens = 2
    assert table.observed_rows(schedule({"a": 3}, {"a": [1, 2]}), states, ["a"]) == []


def test_a_preempted_request_is_prefilled_with_what_it_had_said() -> None:
    table = RequestTable(CONFIG, statistics())
    states = {"a": state("a", [1, 2, 3])}
    table.follow(schedule({"a": 3}), states, ["a"])
    slot = table["a"].slot
    states["a"].output_token_ids.extend([4, 5])
    states["a"].num_computed_tokens = 0
    step = schedule({"a": 5}, resumed=["a"])
    table.follow(step, states, ["a"])
    assert table["a"].slot == slot
    assert table["a"].num_known_tokens == 5
    assert table.observed_rows(step, states, ["a"]) == [ObservedRows(slot, 0, 5, False)]


def test_thresholds_are_the_requests_own() -> None:
    table = RequestTable(SiriusConfig(acceptance="threshold", threshold=0.25), None)
    states = {"a": state("a", [1]), "b": state("b", [1], extra_args={"sirius_threshold": 0.5})}
    table.follow(schedule({"a": 1, "b": 1}), states, ["a", "b"])
    assert table.thresholds(["b", "a"]).tolist() == [0.5, 0.25]


def test_drafts_start_at_the_last_token_and_stand_in_their_rows() -> None:
    engine = Engine()
    engine.states = {"a": state("a", [1, 2]), "b": state("b", [3, 4, 5, 6])}
    # The prompt of b is not complete: it emits nothing, and is not drafted for.
    assert engine.run(schedule({"b": 2, "a": 2}), {"b": [], "a": [9]}) == {"b": [], "a": [10, 11, 12]}
    assert engine.rows_run == [[1]] * 3
    assert engine.run(schedule({"b": 2, "a": 4}, {"a": [10, 11, 12]}), {"b": [20], "a": [10, 11, 5]}) == {
        "b": [21, 22, 23],
        "a": [6, 7, 8],
    }


@pytest.mark.parametrize(
    ("sampling", "emitted", "drafted"),
    [
        ({}, 9, [10, 11, 12]),
        ({"max_tokens": 3}, 9, [10]),
        ({"max_tokens": 2}, 9, []),
        ({"stop_token_ids": [9]}, 9, []),
        ({"stop_token_ids": [11]}, 9, [10]),
        ({"min_tokens": 3, "max_tokens": 8}, 9, [10]),
        ({"extra_args": {"sirius": "off"}}, 9, []),
    ],
    ids=["all", "two-left", "one-left", "ended", "would-end", "must-go-on", "off"],
)
def test_only_what_can_become_text_is_drafted(sampling: dict[str, Any], emitted: int, drafted: list[int]) -> None:
    engine = Engine()
    engine.states = {"a": state("a", [1, 2], **sampling)}
    found = engine.run(schedule({"a": 2}), {"a": [emitted]})["a"]
    if "stop_token_ids" in sampling and emitted not in sampling["stop_token_ids"]:
        # The draft never says an end; what it says in its place is the target's to judge.
        assert not set(found) & set(sampling["stop_token_ids"])
        assert found[: len(drafted)] == drafted
    else:
        assert found == drafted


def test_the_end_of_the_context_bounds_a_draft() -> None:
    engine = Engine()
    engine.states = {"a": state("a", [1] * (LONGEST_TEXT - 3))}
    assert engine.run(schedule({"a": LONGEST_TEXT - 3}), {"a": [9]}) == {"a": [10]}


def test_neurons_are_chosen_once_a_step_for_those_who_draft() -> None:
    engine = Engine()
    asked: list[list[int]] = []
    engine.proposer._selector = SimpleNamespace(select=lambda slots: asked.append(slots.tolist()))
    engine.states = {"a": state("a", [1]), "b": state("b", [2], extra_args={"sirius": "off"})}
    engine.run(schedule({"a": 1, "b": 1}), {"a": [5], "b": [6]})
    assert asked == [engine.proposer.requests.slots(["a"]).tolist()]
    engine.run(schedule({"b": 1}), {"b": [7]})
    assert len(asked) == 1


def test_what_was_accepted_and_nothing_else_enters_the_statistics() -> None:
    engine = Engine()
    engine.states = {"a": state("a", [1])}
    engine.run(schedule({"a": 1}), {"a": [5]})
    slot = engine.proposer.requests["a"].slot
    engine.statistics.energy[slot] = 0.0
    activation = torch.eye(4, NEURONS)
    engine.run(schedule({"a": 4}, {"a": [6, 7, 8]}), {"a": [6, 9]}, activation)
    # Of the four rows that ran, those of 5 and 6 belong to the text: 7 was not what follows.
    assert (engine.statistics.energy[slot] > 0).tolist() == [True, True] + [False] * (NEURONS - 2)


def test_a_rejection_teaches_the_request_how_its_drafts_fare() -> None:
    engine = Engine(SiriusConfig(sparsity="coarse", draft_weights="shared", kernel_size=4, prompt_lookup_tokens=0))
    engine.proposer.adapt(StepCosts({1: 0.1, 8: 0.1}, {1: 1.0, 16: 1.1}))
    engine.states = {"a": state("a", [1])}
    drafted = engine.run(schedule({"a": 1}), {"a": [5]})["a"]
    assert drafted
    acceptance = engine.proposer.requests["a"].acceptance
    assert acceptance is not None
    expected = acceptance.drafted(0.9)
    acceptance.begin()
    acceptance.drafted(0.9)
    engine.run(schedule({"a": 1 + len(drafted)}, {"a": drafted}), {"a": [30]})
    assert acceptance.drafted(0.9) < expected
