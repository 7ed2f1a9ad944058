"""Which rows of a forward pass belong to whom: the plan that the statistics follow, on the host and on the device.

The plan is made on the host before the pass and read on the device while it runs, from buffers whose addresses never
change, so that a captured graph sees the plan of the step in which it is replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -1
"""Slot or pending row of a token that nobody observes."""


@dataclass(frozen=True)
class ObservedRows:
    """A run of neighbouring rows of one forward pass that belong to one request.

    Attributes:
        slot: The request's row in the tables.
        start: First row in the flattened batch.
        count: Number of rows.
        pending: Rows of a verification pass, whose tokens count only once they are accepted.
    """

    slot: int
    start: int
    count: int
    pending: bool


class ObservationPlan:
    """Where the activations of the coming pass go, token by token.

    Attributes:
        direct: Runs whose rows count at once, each with the weights of its rows, oldest first.
        pending_rows: Rows of the batch that wait for their verdict, in the order of the pending table.
        token_slot: Slot that each token adds to, or `IGNORED`, ``int32 [max_tokens]``.
        token_weight: Weight of each token in its slot, ``float32 [max_tokens]``.
        token_pending: Row of the pending table that each token fills, or `IGNORED`, ``int32 [max_tokens]``.

    Args:
        max_tokens: Most tokens of a forward pass whose plan the device must hold; 0 where nothing on the device reads it.
        device: Where the buffers live.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.token_slot = torch.full((max_tokens,), IGNORED, dtype=torch.int32, device=device)
        self.token_weight = torch.zeros(max_tokens, dtype=torch.float32, device=device)
        self.token_pending = torch.full_like(self.token_slot, IGNORED)
        self.direct: list[tuple[ObservedRows, torch.Tensor]] = []
        self.pending_rows: list[int] = []
        self._num_known = 0

    @property
    def num_rows(self) -> int:
        """Leading rows of the pass that hold every observed one; 0 if there is nothing to observe."""
        ends = [run.start + run.count for run, _ in self.direct]
        return max([*ends, *(row + 1 for row in self.pending_rows)], default=0)

    def set(self, direct: Sequence[tuple[ObservedRows, torch.Tensor]], pending: Sequence[ObservedRows]) -> None:
        """Makes the plan of the coming pass, on the host and, where there are buffers, on the device.

        Args:
            direct: Runs that count at once with the weights of their rows, ``float32 [count]`` on the host.
            pending: Runs that wait for their verdict; they fill the pending table in this order.
        """
        self.direct = list(direct)
        self.pending_rows = [row for run in pending for row in range(run.start, run.start + run.count)]
        if self.token_slot.shape[0] == 0:
            return
        known = self.num_rows
        # Rows that the last plan used and this one does not must not keep their old destination.
        size = max(known, self._num_known)
        self._num_known = known
        if size == 0:
            return
        places = torch.full((2, size), IGNORED, dtype=torch.int32)
        weights = torch.zeros(size)
        for run, run_weights in self.direct:
            places[0, run.start : run.start + run.count] = run.slot
            weights[run.start : run.start + run.count] = run_weights
        if self.pending_rows:
            places[1, self.pending_rows] = torch.arange(len(self.pending_rows), dtype=torch.int32)
        device = self.token_slot.device
        if device.type != "cpu":
            # Pinned memory comes from an allocator that waits for the copy before it hands the memory out again.
            places, weights = places.pin_memory(), weights.pin_memory()
        moved = places.to(device, non_blocking=True)
        self.token_slot[:size].copy_(moved[0])
        self.token_pending[:size].copy_(moved[1])
        self.token_weight[:size].copy_(weights.to(device, non_blocking=True))
