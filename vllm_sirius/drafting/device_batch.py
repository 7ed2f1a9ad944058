"""The draft loop's bookkeeping as tensors: no step of it waits for the device, all of it can be captured in a graph.

A request owns a *slot*, its row in the tables, from its first token to its end; a *row* is its place in the current
batch. The tensors keep their addresses, so a captured step works for every batch of its size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

MAX_END_TOKENS = 32
"""End tokens that are kept for a request."""

NO_REQUEST = -1
"""In `DraftBatch.idx_mapping`: a row that drafts nothing."""


class LongestText(Protocol):
    """Whoever knows how long a text may be.

    Attributes:
        max_model_len: Tokens of the longest text. It may change until the KV cache is there.
    """

    max_model_len: int


class DraftTable:
    """What a draft must know of each request.

    Attributes:
        last_position: Last position at which a draft token of the request may stand, ``int64 [num_slots]``; -1 where the
            request does not draft.
        end_token_ids: Tokens that the draft never proposes, filled up with -1, ``int64 [num_slots, MAX_END_TOKENS]``.
        thresholds: Likelihood threshold, ``float32 [num_slots]``.
        num_drafted: Tokens of the request's last draft, ``int32 [num_slots]``.

    Args:
        num_slots: Most requests at a time.
        device: Where the table lives.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.last_position = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        self.end_token_ids = torch.full((num_slots, MAX_END_TOKENS), -1, dtype=torch.int64, device=device)
        self.thresholds = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.num_drafted = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def admit(self, slot: int, last_position: int, end_token_ids: Iterable[int], threshold: float) -> None:
        """Writes a new request into its slot.

        Args:
            slot: Its row in the table.
            last_position: As in the attribute.
            end_token_ids: As in the attribute. A request with more of them than the table holds does not draft: a draft
                that runs past the end of a text would be accepted by a lax threshold.
            threshold: As in the attribute.
        """
        ends = sorted(end_token_ids)
        fits = len(ends) <= MAX_END_TOKENS
        self.last_position[slot] = last_position if fits else -1
        self.thresholds[slot] = threshold
        self.num_drafted[slot] = 0
        padded = (ends if fits else []) + [-1] * (MAX_END_TOKENS - (len(ends) if fits else 0))
        row = torch.tensor(padded, dtype=torch.int64)
        device = self.end_token_ids.device
        if device.type != "cpu":
            row = row.pin_memory()
        self.end_token_ids[slot].copy_(row, non_blocking=True)


class DraftBatch:
    """The rows of one batch that draft, as buffers of the draft forward pass.

    Attributes:
        draft_token_ids: The drafts, ``int64 [max_rows, num_speculative_tokens]``; 0 where a row drafted less.
        step: Index of the draft token that the next forward pass gives, ``int64 []``.

    Args:
        table: What is known of the requests.
        input_ids: Token fed by each row, ``int32 [max_rows or more]``.
        positions: Its position, ``int64``.
        seq_lens: Tokens it attends to, itself included, ``int32``; 0 for rows that only fill a graph up.
        idx_mapping: Slot of each row, or `NO_REQUEST`, ``int64``.
        draft_token_ids: As in the attribute.
        longest: Knows the longest text; a captured graph keeps what it was at capture.
    """

    def __init__(
        self,
        table: DraftTable,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        seq_lens: torch.Tensor,
        idx_mapping: torch.Tensor,
        draft_token_ids: torch.Tensor,
        longest: LongestText,
    ) -> None:
        self.table = table
        self.draft_token_ids = draft_token_ids
        self.step = torch.zeros((), dtype=torch.int64, device=input_ids.device)
        self._input_ids = input_ids
        self._positions = positions
        self._seq_lens = seq_lens
        self._idx_mapping = idx_mapping
        self._longest = longest

    def begin(self, num_rows: int, positions: torch.Tensor, last_sampled: torch.Tensor, emitted: torch.Tensor) -> None:
        """Sets the first draft step up: every row feeds the last token of its text, which has no K/V yet.

        Args:
            num_rows: Rows of the batch; their slots are in `idx_mapping`.
            positions: Position of that token, ``int [num_rows]``.
            last_sampled: That token by slot, ``int64 [num_slots, 1]``.
            emitted: Whether the row emitted a token in this step, ``bool [num_rows]``: a row still in prefill drafts nothing.
        """
        idx_mapping = self._idx_mapping[:num_rows]
        slots = idx_mapping.clamp_min(0)
        drafts = (idx_mapping >= 0) & emitted & (positions + 1 <= self.table.last_position[slots])
        self.step.zero_()
        self.draft_token_ids[:num_rows].zero_()
        self._forget_lengths(idx_mapping, slots)
        self._input_ids[:num_rows] = torch.where(drafts, last_sampled.view(-1)[slots], 0).to(torch.int32)
        self._positions[:num_rows] = positions.clamp_max(self._longest.max_model_len - 1)
        self._seq_lens[:num_rows] = torch.where(drafts, positions + 1, 1).to(torch.int32)
        self._seq_lens[num_rows:].zero_()
        idx_mapping.copy_(torch.where(drafts, idx_mapping, NO_REQUEST))

    def advance(self, num_rows: int, token_ids: torch.Tensor) -> None:
        """Takes in what a draft step proposed and sets the next one up.

        A row that proposed an end token, or whose next token could not become part of the text, leaves the batch: its
        slot mapping becomes padding, so it writes no K/V.

        Args:
            num_rows: Rows of the forward pass, padding included.
            token_ids: Its proposals, ``int64 [num_rows]``.
        """
        idx_mapping = self._idx_mapping[:num_rows]
        slots = idx_mapping.clamp_min(0)
        ended = (self.table.end_token_ids[slots] == token_ids.unsqueeze(1)).any(dim=1)
        kept = (idx_mapping >= 0) & ~ended
        fed = torch.where(kept, token_ids, 0)
        self.draft_token_ids[:num_rows].scatter_(1, self.step.expand(num_rows, 1), fed.unsqueeze(1))
        self.table.num_drafted.index_add_(0, slots, kept.to(torch.int32))
        positions = self._positions[:num_rows] + 1
        goes_on = kept & (positions + 1 <= self.table.last_position[slots])
        self._input_ids[:num_rows] = fed.to(torch.int32)
        self._positions[:num_rows] = positions.clamp_max(self._longest.max_model_len - 1)
        seq_lens = self._seq_lens[:num_rows]
        seq_lens.copy_(torch.where(goes_on, (positions + 1).to(torch.int32), seq_lens.clamp_max(1)))
        idx_mapping.copy_(torch.where(goes_on, idx_mapping, NO_REQUEST))
        self.step.add_(1)

    def _forget_lengths(self, idx_mapping: torch.Tensor, slots: torch.Tensor) -> None:
        """Sets the draft length of every request of the batch to 0; rows without one must not touch slot 0."""
        known = self.table.num_drafted[slots]
        self.table.num_drafted.index_add_(0, slots, torch.where(idx_mapping >= 0, -known, 0))
