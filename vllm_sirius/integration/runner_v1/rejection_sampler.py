"""Sirius's rejection sampler on Model Runner V1. Subclasses ``vllm.v1.sample.rejection_sampler.RejectionSampler``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_sirius.acceptance import (
    accept_by_threshold,
    accept_own_choice,
    emit_tokens,
)
from vllm_sirius.config import SiriusConfig
from vllm_sirius.integration.runner_v1.rejection_sample import acceptance_rule, assert_rule_is_in_force
from vllm_sirius.integration.runner_v1.seeded_draws import draw_seeds


class SiriusRejectionSampler(RejectionSampler):
    """Upstream's sampler with the rules of `acceptance` in the place of its own.

    Grammar masks, penalties, bad words, minimum length, temperature, top-k, top-p and logprobs stay upstream's: the rules
    judge the logits that they have already shaped. The target's own choice at each position is drawn as upstream's plain
    sampler draws it, by the number of the request's generator that belongs to the position (`seeded_draws`), so a lossless
    seeded request gives the same tokens as without speculation.

    Args:
        upstream: The sampler the runner was built with, whose place this one takes.
        speculative_config: The engine's speculative config.
    """

    def __init__(self, upstream: RejectionSampler, speculative_config: Any) -> None:
        super().__init__(upstream.sampler, speculative_config, torch.device("cpu"))
        self._config: SiriusConfig = speculative_config.sirius
        self._thresholds = torch.empty(0)
        self._seeds: torch.Tensor | None = None
        assert_rule_is_in_force()

    def begin_pass(self, thresholds: torch.Tensor) -> None:
        """Takes in what the coming batch is judged by.

        Args:
            thresholds: Likelihood threshold of each row, ``float32 [B]``.
        """
        self._thresholds = thresholds

    def forward(self, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        """As upstream, with `rejection_sample` as the rule."""
        if not any(metadata.num_draft_tokens):
            return self._sample_without_drafts(metadata, logits, sampling_metadata)
        # Before upstream draws the bonus token's.
        self._seeds = _draft_seeds(sampling_metadata.generators, metadata.num_draft_tokens)
        with acceptance_rule(self.rejection_sample):
            output = super().forward(metadata, draft_probs, logits, sampling_metadata)
        assert self._seeds is None, "upstream's sampler did not ask for the rule"
        return output

    def _sample_without_drafts(self, metadata: Any, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        """A step in which no row has a draft: what upstream's `forward` does but for the rule, which has nothing to judge.

        Upstream's top-k fails there: it asks for the largest k of no rows. The calls are upstream's own, in its order and
        with its flags, because states such as a thinking budget follow them.
        """
        output = self.sampler(
            logits=logits[metadata.bonus_logits_indices], sampling_metadata=sampling_metadata, predict_bonus_token=True
        )
        no_rows = logits[metadata.target_logits_indices].to(torch.float32)
        self.apply_logits_processors(no_rows, sampling_metadata, metadata)
        return output

    def rejection_sample(
        self,
        draft_token_ids: torch.Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_logits: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        sampling_metadata: Any,
        **unused: Any,
    ) -> torch.Tensor:
        """The rule, with the signature of upstream's function of the same name.

        The hooks of `rejection_sample` put it in that function's place; a vLLM with the source patches calls it as the
        method that it is.
        """
        seeds, self._seeds = self._seeds, None
        assert seeds is not None
        counts = torch.tensor(num_draft_tokens)
        greedy = _greedy_rows(sampling_metadata, len(num_draft_tokens))
        own = target_logits.argmax(dim=-1)
        if not bool(greedy.all()):
            sampled = torch.ops._C.fused_gumbel_argmax(target_logits.float(), seeds).view(-1)
            own = torch.where(greedy.repeat_interleave(counts), own, sampled)
        if self._config.lossless:
            accepted = accept_own_choice(draft_token_ids, own)
        else:
            temperature = torch.where(greedy, self._config.threshold_temperature, 1.0)
            thresholds = self._row_thresholds(len(num_draft_tokens)).repeat_interleave(counts)
            accepted = accept_by_threshold(
                draft_token_ids, own, target_logits, thresholds, temperature.repeat_interleave(counts)
            )
        return emit_tokens(draft_token_ids, own, accepted, counts, bonus_token_ids.view(-1), max_spec_len)

    def _row_thresholds(self, num_rows: int) -> torch.Tensor:
        """Thresholds of a batch's rows; a profiling run has rows without requests, and their number may be any."""
        known = self._thresholds[:num_rows]
        return torch.cat([known, known.new_full((num_rows - len(known),), self._config.threshold)])


def _draft_seeds(generators: Mapping[int, torch.Generator], num_draft_tokens: Sequence[int]) -> torch.Tensor:
    """Seeds of the target's own choices at the drafted positions, in the order in which plain decoding would draw them.

    A request's generator is then at the draw of its bonus token.

    Args:
        generators: Generators of the seeded requests by row, each at the draw of the first drafted position.
        num_draft_tokens: Drafts of each row.

    Returns:
        ``int64 [N]``, one for each drafted position.
    """
    seeds = [draw_seeds(generators.get(row), count) for row, count in enumerate(num_draft_tokens)]
    return torch.cat(seeds) if seeds else torch.empty(0, dtype=torch.long)


def _greedy_rows(sampling_metadata: Any, num_requests: int) -> torch.Tensor:
    if sampling_metadata.all_greedy:
        return torch.ones(num_requests, dtype=torch.bool)
    greedy: torch.Tensor = sampling_metadata.temperature[:num_requests] == 0
    return greedy
