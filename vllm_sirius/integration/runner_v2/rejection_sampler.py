"""Sirius's rejection sampler on Model Runner V2. Subclasses ``RejectionSampler`` of ``vllm.v1.worker.gpu``."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_sirius.acceptance import accept_by_threshold, accept_drawn, accept_own_choice, uniform_noise
from vllm_sirius.config import SiriusConfig
from vllm_sirius.drafting.device_batch import DraftTable
from vllm_sirius.kernels.triton.acceptance import pick_tokens


class SiriusRejectionSampler(RejectionSampler):
    """Upstream's sampler with the rules of `acceptance` in the place of its own.

    Chunking, grammar masks, penalties, temperature, top-k, top-p and logprobs stay upstream's. The target's own choice at
    each position is drawn from the noise of that position and the request's seed, exactly as plain decoding draws it, so a
    lossless request gives the tokens that it would give without speculation.

    Args:
        sampler: The runner's plain sampler.
        speculative_config: The engine's speculative config.
        device: Where it runs.
        table: Threshold and draft length of each request.
    """

    def __init__(self, sampler: Any, speculative_config: Any, device: torch.device, table: DraftTable) -> None:
        super().__init__(sampler, speculative_config, device)
        self._config: SiriusConfig = speculative_config.sirius
        self._table = table

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: Any,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: Any,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As upstream's, with Sirius's rule: processed logits, sampled tokens and their number per request."""
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        # A row of logits judges the input of the next row, if that is a draft of the same request.
        is_draft = self._is_draft(expanded_idx_mapping, expanded_local_pos)
        drafts = torch.where(is_draft, verify_draft_sampled.long(), -1)
        drafts = torch.cat([drafts[1:], drafts.new_full((1,), -1)])
        slots = expanded_idx_mapping.long()
        if draft_logits is not None:
            own, accepted = self._judge_drawn(drafts, processed, draft_logits, slots, pos, expanded_local_pos)
        else:
            own = self._sample(processed, slots, pos, idx_mapping_np)
            accepted = self._judge(drafts, own, processed, slots)
        sampled, num_sampled = pick_tokens(own, drafts, accepted, cu_num_logits, self.num_speculative_steps + 1)
        return processed, sampled, num_sampled

    def _judge(
        self, drafts: torch.Tensor, own: torch.Tensor, processed: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Whether each draft passes, ``bool [num_logits]``."""
        if self._config.lossless:
            return accept_own_choice(drafts, own)
        greedy = self.sampler.sampling_states.temperature.gpu[slots] == 0.0
        sharpness = torch.where(greedy, self._config.threshold_temperature, 1.0)
        return accept_by_threshold(drafts, own, processed, self._table.thresholds[slots], sharpness)

    def _judge_drawn(
        self,
        drafts: torch.Tensor,
        processed: torch.Tensor,
        draft_logits: torch.Tensor,
        slots: torch.Tensor,
        pos: torch.Tensor,
        local_pos: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's choice at each row, and whether the draft, drawn from `draft_logits`, passes."""
        states = self.sampler.sampling_states
        temperature = states.temperature.gpu[slots]
        greedy = temperature == 0.0
        steps = local_pos.long().clamp_max(self.num_speculative_steps - 1)
        drawn_from = draft_logits[slots, steps].float() / torch.where(greedy, 1.0, temperature).unsqueeze(1)
        passes, others = accept_drawn(drafts, processed, drawn_from, uniform_noise(states.seeds.gpu[slots], pos))
        own = self._draw(torch.where(greedy.unsqueeze(1), processed.float(), others), slots, pos)
        return own, torch.where(greedy, accept_own_choice(drafts, own), passes)

    def _sample(
        self, processed: torch.Tensor, slots: torch.Tensor, pos: torch.Tensor, idx_mapping_np: Any
    ) -> torch.Tensor:
        """The target's own choice at each row, ``int64 [num_logits]``."""
        if bool((self.sampler.sampling_states.temperature.np[idx_mapping_np] == 0.0).all()):
            return processed.argmax(dim=-1)
        return self._draw(processed, slots, pos)

    def _draw(self, logits: torch.Tensor, slots: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """Draws a token at each row by the noise that plain decoding would use there; greedy rows take the largest."""
        states = self.sampler.sampling_states
        drawn: torch.Tensor = gumbel_sample(
            logits,
            slots,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        return drawn

    def _is_draft(self, slots: torch.Tensor, local_pos: torch.Tensor) -> torch.Tensor:
        """Whether the input of each row is a token that the request drafted, ``bool [num_logits]``.

        Args:
            slots: Slot of each row.
            local_pos: Place of each row in its request, 0 for the last token of the text.
        """
        return (local_pos > 0) & (local_pos <= self._table.num_drafted[slots.long()])
