"""Sirius's rejection sampler on Model Runner V1. Subclasses ``vllm.v1.sample.rejection_sampler.RejectionSampler``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_sirius.acceptance import (
    PLACEHOLDER_TOKEN_ID,
    accept_by_threshold,
    accept_own_choice,
    emit_tokens,
)
from vllm_sirius.config import SiriusConfig
from vllm_sirius.integration.runner_v1.rejection_sample import acceptance_rule, assert_rule_is_in_force


class SiriusRejectionSampler(RejectionSampler):
    """Upstream's sampler with the rules of `acceptance` in the place of its own.

    Grammar masks, penalties, bad words, minimum length, temperature, top-k, top-p and logprobs stay upstream's: the rules
    judge the logits that they have already shaped. The target's own choice at each position is drawn as upstream's plain
    sampler draws it, one number of the request's generator per emitted token, so a lossless seeded request gives the same
    tokens as without speculation.

    Args:
        upstream: The sampler the runner was built with, whose place this one takes.
        speculative_config: The engine's speculative config.
        thresholds: Takes the number B of rows, returns their likelihood thresholds, ``float32 [B]``.
    """

    def __init__(
        self, upstream: RejectionSampler, speculative_config: Any, thresholds: Callable[[int], torch.Tensor]
    ) -> None:
        super().__init__(upstream.sampler, speculative_config, torch.device("cpu"))
        self._config: SiriusConfig = speculative_config.sirius
        self._thresholds = thresholds
        self._noise: _DraftNoise | None = None
        assert_rule_is_in_force()

    def forward(self, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        """As upstream, with `rejection_sample` as the rule."""
        if not any(metadata.num_draft_tokens):
            return self._sample_without_drafts(metadata, logits, sampling_metadata)
        noise = self._noise = _DraftNoise(sampling_metadata.generators, metadata.num_draft_tokens)
        with acceptance_rule(self.rejection_sample):
            output = super().forward(metadata, draft_probs, logits, sampling_metadata)
        assert self._noise is None, "upstream's sampler did not ask for the rule"
        noise.give_back(output.sampled_token_ids)
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
        noise, self._noise = self._noise, None
        assert noise is not None
        counts = torch.tensor(num_draft_tokens)
        greedy = _greedy_rows(sampling_metadata, len(num_draft_tokens))
        own = target_logits.argmax(dim=-1)
        if not bool(greedy.all()):
            sampled = torch.ops._C.fused_gumbel_argmax(target_logits.float(), noise.seeds).view(-1)
            own = torch.where(greedy.repeat_interleave(counts), own, sampled)
        if self._config.lossless:
            accepted = accept_own_choice(draft_token_ids, own)
        else:
            temperature = torch.where(greedy, self._config.threshold_temperature, 1.0)
            thresholds = self._thresholds(len(num_draft_tokens)).repeat_interleave(counts)
            accepted = accept_by_threshold(
                draft_token_ids, own, target_logits, thresholds, temperature.repeat_interleave(counts)
            )
        return emit_tokens(draft_token_ids, own, accepted, counts, bonus_token_ids.view(-1), max_spec_len)


class _DraftNoise:
    """Seeds of the target's own choices at the drafted positions, in the order plain decoding would draw them.

    Making it moves each request's generator to where the bonus token is drawn; `give_back` then moves it to where plain
    decoding would be after the tokens that were emitted.

    Args:
        generators: Generators of the seeded requests by row.
        num_draft_tokens: Drafts of each row.

    Attributes:
        seeds: ``int64 [N]``, one for each drafted position.
    """

    def __init__(self, generators: Mapping[int, torch.Generator], num_draft_tokens: Sequence[int]) -> None:
        self._generators = {row: g for row, g in generators.items() if row < len(num_draft_tokens)}
        self._states = {row: generator.get_state() for row, generator in self._generators.items()}
        seeds: list[torch.Tensor] = []
        for row, count in enumerate(num_draft_tokens):
            generator = self._generators.get(row)
            seeds.extend(_draw(generator) for _ in range(count))
        self.seeds = torch.cat(seeds) if seeds else torch.empty(0, dtype=torch.long)

    def give_back(self, emitted: torch.Tensor) -> None:
        """Takes back the draws of rejected positions.

        Args:
            emitted: Tokens of each row, filled up with placeholders, ``int [B, most drafts + 1]``.
        """
        counts = (emitted != PLACEHOLDER_TOKEN_ID).sum(dim=1).tolist()
        for row, generator in self._generators.items():
            generator.set_state(self._states[row])
            for _ in range(counts[row]):
                _draw(generator)


def _draw(generator: torch.Generator | None) -> torch.Tensor:
    """One seed, as upstream's CPU sampler draws it for one token."""
    return torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)


def _greedy_rows(sampling_metadata: Any, num_requests: int) -> torch.Tensor:
    if sampling_metadata.all_greedy:
        return torch.ones(num_requests, dtype=torch.bool)
    greedy: torch.Tensor = sampling_metadata.temperature[:num_requests] == 0
    return greedy
