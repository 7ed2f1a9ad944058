"""Sirius's rejection sampler on Model Runner V1. Subclasses ``vllm.v1.sample.rejection_sampler.RejectionSampler``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.sample.rejection_sampler import RejectionSampler

from vllm_sirius.acceptance import accept_by_threshold, emit_tokens
from vllm_sirius.integration.runner_v1.rejection_sample import acceptance_rule


class SiriusRejectionSampler(RejectionSampler):
    """Upstream's sampler with the threshold rule in the place of rejection sampling.

    Grammar masks, penalties, bad words, minimum length, temperature, top-k, top-p and logprobs stay upstream's: the rule
    judges the logits that they have already shaped. A lossless engine keeps upstream's own sampler.

    Args:
        upstream: The sampler the runner was built with.
        thresholds: Takes the number B of rows, returns their likelihood thresholds, ``float32 [B]``.
        temperature: Temperature of the likelihood for greedy requests.
    """

    def __init__(
        self, upstream: RejectionSampler, thresholds: Callable[[int], torch.Tensor], temperature: float
    ) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update({key: value for key, value in vars(upstream).items() if key not in self.__dict__})
        self._modules.update(upstream._modules)
        self._thresholds = thresholds
        self._temperature = temperature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream, with `_threshold_sample` as the rule."""
        with acceptance_rule(self._threshold_sample):
            return super().forward(*args, **kwargs)

    def _threshold_sample(
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
        """The rule, with the signature of upstream's `rejection_sample`."""
        counts = torch.tensor(num_draft_tokens)
        greedy = _greedy_rows(sampling_metadata, len(num_draft_tokens))
        own = _own_choice(target_logits, num_draft_tokens, greedy, sampling_metadata.generators)
        temperature = torch.where(greedy, self._temperature, 1.0)
        accepted = accept_by_threshold(
            draft_token_ids,
            own,
            target_logits,
            self._thresholds(len(num_draft_tokens)).repeat_interleave(counts),
            temperature.repeat_interleave(counts),
        )
        return emit_tokens(draft_token_ids, own, accepted, counts, bonus_token_ids.view(-1), max_spec_len)


def _greedy_rows(sampling_metadata: Any, num_requests: int) -> torch.Tensor:
    if sampling_metadata.all_greedy:
        return torch.ones(num_requests, dtype=torch.bool)
    greedy: torch.Tensor = sampling_metadata.temperature[:num_requests] == 0
    return greedy


def _own_choice(
    target_logits: torch.Tensor,
    num_draft_tokens: list[int],
    greedy: torch.Tensor,
    generators: dict[int, torch.Generator],
) -> torch.Tensor:
    """What the target itself would emit at each drafted position, ``int64 [N]``.

    Sampling rows use the Gumbel trick (argmax of p / exponential noise), as upstream's sampler does, with the request's own
    generator where it has a seed.
    """
    own = target_logits.argmax(dim=-1)
    if bool(greedy.all()):
        return own
    noise = torch.empty_like(target_logits, dtype=torch.float32).exponential_()
    start = 0
    for row, count in enumerate(num_draft_tokens):
        generator = generators.get(row)
        if generator is not None and count:
            noise[start : start + count].exponential_(generator=generator)
        start += count
    sampled = target_logits.softmax(dim=-1, dtype=torch.float32).div_(noise).argmax(dim=-1)
    return torch.where(greedy.repeat_interleave(torch.tensor(num_draft_tokens)), own, sampled)
