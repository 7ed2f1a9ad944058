"""The state of Sirius on Model Runner V1: who runs, what the statistics see, what each request may draft."""

from __future__ import annotations

from typing import Any

import torch

from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.drafting.length import max_useful_draft_tokens
from vllm_sirius.drafting.loop import DraftRequest
from vllm_sirius.drafting.prompt_lookup import PromptLookup
from vllm_sirius.integration.runner_v1.request_table import SiriusRequest, make_request
from vllm_sirius.integration.speculative_config import sirius_config
from vllm_sirius.integration.target import LoadedTarget, install_switch
from vllm_sirius.pacing.policy import Draft, DraftPolicy, FullLength, LengthRule
from vllm_sirius.sparsity.observation import ObservedRows
from vllm_sirius.sparsity.selector import NeuronSelector
from vllm_sirius.sparsity.statistics import NeuronStatistics


class SiriusProposer:
    """The drafter of one engine.

    Args:
        vllm_config: The engine's config; upstream builds drafters of method ``custom_class`` with it alone.
    """

    def __init__(self, vllm_config: Any) -> None:
        config = sirius_config(vllm_config.speculative_config) or vllm_config.speculative_config.sirius
        self.config = config
        self.vllm_config = vllm_config
        self.ffns: ReducedFFNs
        self.statistics: NeuronStatistics | None = None
        self._selector: NeuronSelector | None = None
        self._requests: dict[str, SiriusRequest] = {}
        self.policy: DraftPolicy | None = None
        self._full_length = FullLength()
        self.lookup: PromptLookup | None = None

    @property
    def max_model_len(self) -> int:
        """Longest text. Read anew each time: vLLM may fit it to the KV cache after the runner was built."""
        longest: int = self.vllm_config.model_config.max_model_len
        return longest

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Upstream's seam for drafters of method ``custom_class``; the runner overrides its caller."""
        raise AssertionError("SiriusCPUModelRunner.propose_draft_token_ids drafts")

    def attach(self, target: LoadedTarget) -> None:
        """Puts the switch between target and draft into a freshly loaded target."""
        self.ffns, self._selector = install_switch(target, self.vllm_config)
        self.statistics = self.ffns.statistics

    def thresholds(self, req_ids: list[str], num_rows: int) -> torch.Tensor:
        """Likelihood threshold of each row of the batch, ``float32 [num_rows]``.

        Args:
            req_ids: Requests in batch order; fewer than `num_rows` in a profiling run, which has rows without requests.
            num_rows: Rows of the batch.
        """
        known = [self._requests[req_id].threshold for req_id in req_ids[:num_rows]]
        return torch.tensor(known + [self.config.threshold] * (num_rows - len(known)))

    def begin_step(self, scheduler_output: Any, states: dict[str, Any], req_ids: list[str]) -> None:
        """Follows upstream's requests, and tells the statistics whose rows the coming forward pass holds.

        Args:
            scheduler_output: The step.
            states: Upstream's request states by id.
            req_ids: Requests in batch order.
        """
        for req_id in [req_id for req_id in self._requests if req_id not in states]:
            self._forget(req_id)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        for req_id in req_ids:
            state = states[req_id]
            if req_id not in self._requests:
                self._admit(req_id, state)
            elif req_id in resumed:
                self._restart(self._requests[req_id], state)
            judged = scheduler_output.scheduled_spec_decode_tokens.get(req_id, ())
            self._requests[req_id].num_drafted = len(judged)
        if self.statistics is not None:
            self.statistics.begin_step(self._observed_rows(scheduler_output, states, req_ids))

    def _observed_rows(self, scheduler_output: Any, states: dict[str, Any], req_ids: list[str]) -> list[ObservedRows]:
        runs = []
        start = 0
        for req_id in req_ids:
            count = scheduler_output.num_scheduled_tokens[req_id]
            request = self._requests[req_id]
            prefill = states[req_id].num_computed_tokens < request.num_known_tokens
            if request.slot is not None and (prefill or self.config.refresh):
                prompt_rows = min(count, request.num_known_tokens - states[req_id].num_computed_tokens)
                runs.append(ObservedRows(request.slot, start, prompt_rows if prefill else count, not prefill))
            start += count
        return runs

    def end_step(
        self,
        req_ids: list[str],
        sampled_token_ids: list[list[int]],
        num_tokens: Any,
        token_ids: Any,
        num_spec_tokens: int,
        seconds: tuple[float, float],
    ) -> list[DraftRequest]:
        """Takes in what the target accepted, refreshes the neuron set and says what to draft.

        Args:
            req_ids: Requests in batch order.
            sampled_token_ids: Tokens emitted per row, empty for prefill chunks.
            num_tokens: Length of each row's text, the new tokens included, ``int [B]``.
            token_ids: Text of each row, ``int32 [B, longest]``.
            num_spec_tokens: Most tokens to draft in this step.
            seconds: What the pass and all around it took, and what drafting the tokens that it judged took.

        Returns:
            The rows that draft.
        """
        if self.statistics is not None:
            self.statistics.end_step()
            # Counts the accepted rows of the verification pass.
            self.statistics.commit(self._slots(req_ids), torch.tensor([len(tokens) for tokens in sampled_token_ids]))
        to_draft = []
        decoding = True
        for row, (req_id, emitted) in enumerate(zip(req_ids, sampled_token_ids, strict=True)):
            request = self._requests[req_id]
            first = int(num_tokens[row]) - len(emitted) == request.num_known_tokens
            decoding = decoding and bool(emitted) and not first
            if not emitted:
                continue
            self._take_in(request, len(emitted), first)
            text = token_ids[row, : int(num_tokens[row])]
            draft = self._draft_request(row, request, text, num_spec_tokens)
            if draft is not None:
                to_draft.append(draft)
        if decoding and self.policy is not None:
            num_judged = sum(self._requests[req_id].num_drafted for req_id in req_ids)
            num_emitted = sum(map(len, sampled_token_ids))
            self.policy.observe_step(len(req_ids), len(req_ids) + num_judged, num_emitted, *seconds)
        return to_draft

    def begin_drafts(self, req_ids: list[str], to_draft: list[DraftRequest]) -> LengthRule:
        """What decides how far the rows of `end_step` are drafted.

        Args:
            req_ids: Requests in batch order.
            to_draft: The rows that draft.
        """
        if self.policy is None:
            self._full_length.begin(self.lookup.costs if self.lookup is not None else None)
            return self._full_length
        drafts = []
        for draft in to_draft:
            acceptance = self._requests[req_ids[draft.row]].acceptance
            assert acceptance is not None
            drafts.append(Draft(draft.row, acceptance))
        self.policy.begin(drafts, len(req_ids))
        return self.policy

    def select_neurons(self, req_ids: list[str], to_draft: list[DraftRequest]) -> None:
        """Chooses the neurons of the coming drafts. Arguments as in `begin_drafts`."""
        if self._selector is not None:
            self._selector.select(self._slots([req_ids[draft.row] for draft in to_draft]))

    def _take_in(self, request: SiriusRequest, num_emitted: int, first: bool) -> None:
        if not first and request.acceptance is not None:
            request.acceptance.judged(num_emitted - 1, request.num_drafted)
        if self.statistics is None or request.slot is None:
            return
        if first:
            self.statistics.learn_prior(request.slot)

    def _draft_request(self, row: int, request: SiriusRequest, text: Any, num_spec_tokens: int) -> DraftRequest | None:
        last_token_id, num_tokens = int(text[-1]), len(text)
        if not request.enabled or last_token_id in request.end_token_ids:
            return None
        emitted = num_tokens - request.num_prompt_tokens
        remaining = request.max_tokens - emitted if request.max_tokens is not None else self.max_model_len
        length = max_useful_draft_tokens(num_spec_tokens, num_tokens - 1, remaining, self.max_model_len)
        if emitted < request.min_tokens:
            # Upstream rules the end of the text out for the token after a draft by the length before the draft.
            length = min(length, request.min_tokens - emitted - 1)
        if length == 0:
            return None
        return DraftRequest(row, last_token_id, num_tokens - 1, length, request.end_token_ids, text)

    def _slots(self, req_ids: list[str]) -> torch.Tensor:
        assert self.statistics is not None
        slots = [self._requests[req_id].slot for req_id in req_ids]
        return torch.tensor([self.statistics.nobody if slot is None else slot for slot in slots])

    def _admit(self, req_id: str, state: Any) -> None:
        slot = self.statistics.acquire(state.num_computed_tokens) if self.statistics is not None else None
        acceptance = self.policy.new_request() if self.policy is not None else None
        self._requests[req_id] = make_request(
            state.sampling_params, self.config, state.num_prompt_tokens, slot, acceptance
        )

    def _restart(self, request: SiriusRequest, state: Any) -> None:
        """A preempted request comes back: all its tokens, generated ones too, are prefilled again."""
        request.num_known_tokens = state.num_tokens
        if request.acceptance is not None:
            request.acceptance.begin()
        if self.statistics is not None and request.slot is not None:
            self.statistics.reset(request.slot, state.num_computed_tokens)

    def _forget(self, req_id: str) -> None:
        slot = self._requests.pop(req_id).slot
        if self.statistics is not None and slot is not None:
            self.statistics.release(slot)
