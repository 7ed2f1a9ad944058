"""The requests of Model Runner V1, keyed by request id, because their rows move between steps. Follows ``GPUModelRunner``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sirius.config import SiriusConfig
from vllm_sirius.pacing.confidence import RequestAcceptance
from vllm_sirius.request_rules import RequestRules
from vllm_sirius.sparsity.observation import ObservedRows
from vllm_sirius.sparsity.statistics import NeuronStatistics


@dataclass
class SiriusRequest:
    """State of one request.

    Attributes:
        rules: What may be drafted for it.
        slot: Its row in the neuron statistics, or ``None``.
        num_known_tokens: Tokens known when it (re)started: below this position a forward pass is prefill.
        acceptance: How its drafts fare, or ``None`` where lengths do not adapt.
        num_drafted: Draft tokens that the running pass judges.
    """

    rules: RequestRules
    slot: int | None
    num_known_tokens: int
    acceptance: RequestAcceptance | None = None
    num_drafted: int = 0


class RequestTable:
    """Follows upstream's requests, and gives each its slot in the neuron statistics.

    Args:
        config: The engine's config.
        statistics: Neuron statistics of the requests, or ``None`` where no neurons are chosen by them.
    """

    def __init__(self, config: SiriusConfig, statistics: NeuronStatistics | None) -> None:
        self._config = config
        self._statistics = statistics
        self._requests: dict[str, SiriusRequest] = {}

    def __getitem__(self, req_id: str) -> SiriusRequest:
        return self._requests[req_id]

    def __len__(self) -> int:
        return len(self._requests)

    def follow(self, scheduler_output: Any, states: dict[str, Any], req_ids: Sequence[str]) -> list[SiriusRequest]:
        """Takes in which requests a step runs, and how many drafts of each it judges.

        Args:
            scheduler_output: The step.
            states: Upstream's request states by id.
            req_ids: Requests in batch order.

        Returns:
            The requests that are new.
        """
        for req_id in [req_id for req_id in self._requests if req_id not in states]:
            self._forget(req_id)
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        new = []
        for req_id in req_ids:
            if req_id not in self._requests:
                self._requests[req_id] = self._admit(states[req_id])
                new.append(self._requests[req_id])
            elif req_id in resumed:
                self._restart(self._requests[req_id], states[req_id])
            judged = scheduler_output.scheduled_spec_decode_tokens.get(req_id, ())
            self._requests[req_id].num_drafted = len(judged)
        return new

    def observed_rows(
        self, scheduler_output: Any, states: dict[str, Any], req_ids: Sequence[str]
    ) -> list[ObservedRows]:
        """Whose rows the coming forward pass holds, as far as the statistics want them. Arguments as in `follow`."""
        runs = []
        start = 0
        for req_id in req_ids:
            count = scheduler_output.num_scheduled_tokens[req_id]
            request = self._requests[req_id]
            num_prompt_rows = request.num_known_tokens - states[req_id].num_computed_tokens
            prefill = num_prompt_rows > 0
            if request.slot is not None and (prefill or self._config.refresh):
                observed = min(count, num_prompt_rows) if prefill else count
                runs.append(ObservedRows(request.slot, start, observed, not prefill))
            start += count
        return runs

    def thresholds(self, req_ids: Sequence[str]) -> torch.Tensor:
        """Likelihood threshold of each row of a batch, ``float32 [len(req_ids)]``.

        Args:
            req_ids: Requests in batch order.
        """
        return torch.tensor([self._requests[req_id].rules.threshold for req_id in req_ids], dtype=torch.float32)

    def slots(self, req_ids: Sequence[str]) -> torch.Tensor:
        """Row of each request in the neuron statistics, ``int64 [len(req_ids)]``; only where there are statistics.

        Args:
            req_ids: The requests.
        """
        assert self._statistics is not None
        slots = [self._requests[req_id].slot for req_id in req_ids]
        return torch.tensor([self._statistics.nobody if slot is None else slot for slot in slots])

    def _admit(self, state: Any) -> SiriusRequest:
        slot = self._statistics.acquire(state.num_computed_tokens) if self._statistics is not None else None
        rules = RequestRules.read(state.sampling_params, state.num_prompt_tokens, self._config)
        return SiriusRequest(rules, slot, state.num_prompt_tokens)

    def _restart(self, request: SiriusRequest, state: Any) -> None:
        """A preempted request comes back: all its tokens, generated ones too, are prefilled again."""
        request.num_known_tokens = state.num_tokens
        if request.acceptance is not None:
            request.acceptance.begin()
        if self._statistics is not None and request.slot is not None:
            self._statistics.reset(request.slot, state.num_computed_tokens)

    def _forget(self, req_id: str) -> None:
        slot = self._requests.pop(req_id).slot
        if self._statistics is not None and slot is not None:
            self._statistics.release(slot)
