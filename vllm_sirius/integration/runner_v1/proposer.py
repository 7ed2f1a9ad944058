"""Sirius's proposer on Model Runner V1: commits what the target accepted, selects neurons, drafts.

The class is upstream's drafter of method ``custom_class`` (``vllm.v1.spec_decode.custom_class_proposer``). Its `propose` takes
what upstream's caller does not hand over, so `SiriusCPUModelRunner.propose_draft_token_ids` calls it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.drafting.loop import DraftForward, DraftRequest, draft_tokens
from vllm_sirius.drafting.prompt_lookup import PromptLookup
from vllm_sirius.integration.runner_v1.request_table import RequestTable, SiriusRequest
from vllm_sirius.integration.speculative_config import sirius_config
from vllm_sirius.integration.target import LoadedTarget, install_switch
from vllm_sirius.pacing.costs import StepCosts
from vllm_sirius.pacing.policy import Draft, DraftPolicy, FullLength, LengthRule
from vllm_sirius.sparsity.selector import NeuronSelector
from vllm_sirius.sparsity.statistics import NeuronStatistics


@dataclass(frozen=True)
class VerifiedStep:
    """What is known once the target has verified a batch.

    Attributes:
        req_ids: Requests in batch order.
        sampled_token_ids: Tokens emitted per row, empty for prefill chunks.
        num_tokens: Length of each row's text, the new tokens included, ``int [B]``.
        token_ids: Text of each row, ``int32 [B, longest]``.
        num_speculative_tokens: Most tokens to draft now.
    """

    req_ids: Sequence[str]
    sampled_token_ids: Sequence[Sequence[int]]
    num_tokens: Any
    token_ids: Any
    num_speculative_tokens: int


class SiriusProposer:
    """The drafter of one engine.

    Args:
        vllm_config: The engine's config; upstream builds drafters of method ``custom_class`` with it alone.
    """

    def __init__(self, vllm_config: Any) -> None:
        config = sirius_config(vllm_config.speculative_config)
        assert config is not None
        self.config = config
        self.vllm_config = vllm_config
        self.ffns: ReducedFFNs
        self.requests: RequestTable
        self.statistics: NeuronStatistics | None = None
        self.policy: DraftPolicy | None = None
        self.lookup: PromptLookup | None = None
        self._selector: NeuronSelector | None = None
        self._full_length = FullLength()
        self._drafted_at = self._draft_seconds = 0.0

    def attach(self, target: LoadedTarget) -> None:
        """Puts the switch between target and draft into a freshly loaded target."""
        self.ffns, self._selector = install_switch(target, self.vllm_config)
        self.statistics = self.ffns.statistics
        self.requests = RequestTable(self.config, self.statistics)

    def adapt(self, costs: StepCosts) -> None:
        """From now on draft lengths and prompt lookup go by what steps cost, as far as the options want it.

        Args:
            costs: The costs, which go on learning.
        """
        if self.config.adaptive:
            self.policy = DraftPolicy(costs)
        if self.config.prompt_lookup_tokens:
            self.lookup = PromptLookup(costs.draft, self.config.prompt_lookup_tokens)

    def begin_pass(self, scheduler_output: Any, states: dict[str, Any], req_ids: Sequence[str]) -> None:
        """Follows upstream's requests, and tells the statistics whose rows the coming forward pass holds.

        Args:
            scheduler_output: The step.
            states: Upstream's request states by id.
            req_ids: Requests in batch order.
        """
        for request in self.requests.follow(scheduler_output, states, req_ids):
            request.acceptance = self.policy.new_request() if self.policy is not None else None
        if self.statistics is not None:
            self.statistics.begin_step(self.requests.observed_rows(scheduler_output, states, req_ids))

    def propose(self, step: VerifiedStep, forward: DraftForward) -> list[list[int]]:
        """Drafts for every request that emitted tokens.

        Args:
            step: What the target's pass gave.
            forward: One draft step on this batch.

        Returns:
            Draft tokens per row.
        """
        started = time.perf_counter()
        self._commit(step)
        self._observe_pace(step, started - self._drafted_at)
        drafts: list[list[int]] = [[] for _ in step.sampled_token_ids]
        for row, token_ids in self._draft(step, forward).items():
            drafts[row] = token_ids
        self._drafted_at = time.perf_counter()
        self._draft_seconds = self._drafted_at - started
        return drafts

    def _commit(self, step: VerifiedStep) -> None:
        """Statistics and acceptance rates take in what the target accepted."""
        if self.statistics is not None:
            self.statistics.end_step()
            counts = torch.tensor([len(token_ids) for token_ids in step.sampled_token_ids])
            self.statistics.commit(self.requests.slots(step.req_ids), counts)
        for row, emitted in enumerate(step.sampled_token_ids):
            request = self.requests[step.req_ids[row]]
            if not emitted:
                continue
            if not self._is_first(step, row):
                if request.acceptance is not None:
                    request.acceptance.judged(len(emitted) - 1, request.num_drafted)
            elif self.statistics is not None and request.slot is not None:
                self.statistics.learn_prior(request.slot)

    def _is_first(self, step: VerifiedStep, row: int) -> bool:
        """Whether a row's tokens are those that end its prefill."""
        request = self.requests[step.req_ids[row]]
        return int(step.num_tokens[row]) - len(step.sampled_token_ids[row]) == request.num_known_tokens

    def _observe_pace(self, step: VerifiedStep, seconds: float) -> None:
        """The policy takes in what a step took in which every row decoded.

        Args:
            step: The step.
            seconds: What the target's pass and all around it but drafting took.
        """
        rows = enumerate(step.sampled_token_ids)
        if self.policy is None or not all(emitted and not self._is_first(step, row) for row, emitted in rows):
            return
        num_rows = len(step.req_ids)
        num_judged = sum(self.requests[req_id].num_drafted for req_id in step.req_ids)
        num_emitted = sum(map(len, step.sampled_token_ids))
        self.policy.observe_step(num_rows, num_rows + num_judged, num_emitted, seconds, self._draft_seconds)

    def _draft(self, step: VerifiedStep, forward: DraftForward) -> dict[int, list[int]]:
        requests = [request for row in range(len(step.req_ids)) for request in self._draft_requests(step, row)]
        if not requests:
            return {}
        rule = self._length_rule(step, requests)
        chosen = set(rule.choose([request.row for request in requests]))
        requests = [request for request in requests if request.row in chosen]
        if requests and self._selector is not None:
            self._selector.select(self.requests.slots([step.req_ids[request.row] for request in requests]))
        return draft_tokens(requests, forward, rule, self.lookup)

    def _draft_requests(self, step: VerifiedStep, row: int) -> list[DraftRequest]:
        """What to draft for a row, or nothing."""
        rules = self.requests[step.req_ids[row]].rules
        text = step.token_ids[row, : int(step.num_tokens[row])]
        last_token_id = int(text[-1])
        if not step.sampled_token_ids[row] or last_token_id in rules.end_token_ids:
            return []
        # Read anew each time: vLLM may fit the longest text to the KV cache after the runner was built.
        longest: int = self.vllm_config.model_config.max_model_len
        most = rules.most_draft_tokens(len(text), step.num_speculative_tokens, longest)
        if most == 0:
            return []
        return [DraftRequest(row, last_token_id, len(text) - 1, most, rules.end_token_ids, text)]

    def _length_rule(self, step: VerifiedStep, requests: Sequence[DraftRequest]) -> LengthRule:
        """What decides how far a batch is drafted."""
        if self.policy is None:
            self._full_length.begin(self.lookup.costs if self.lookup is not None else None)
            return self._full_length
        drafts = []
        for request in requests:
            state: SiriusRequest = self.requests[step.req_ids[request.row]]
            assert state.acceptance is not None
            drafts.append(Draft(request.row, state.acceptance))
        self.policy.begin(drafts, len(step.req_ids))
        return self.policy
