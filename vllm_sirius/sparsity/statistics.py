"""The flocking statistic of GRIFFIN, kept per request, refreshed from correction passes.

For a token with FFN activation ``z`` (``act(gate) * up``, before the down projection) the statistic adds
``(z / ||z||)**2`` to the row of the token's request, after the row has faded by a decay. Without decay the sum over a
prompt is the square of GRIFFIN's ``s`` (arXiv 2404.01365), which has the same order.

All tables are allocated once. A request owns one *slot*, a row of the tables, from its first token to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

REFRESH_DECAY = 0.97
"""Factor per token by which older activations fade where the set is refreshed: a memory of about 33 tokens."""

PRIOR_DECAY = 0.9
"""Factor per finished prompt by which the model-wide prior fades."""

PRIOR_TOKENS = 16.0
"""Most tokens of weight that the prior lends a request whose prompt came from the prefix cache."""


@dataclass(frozen=True)
class ObservedRows:
    """A run of neighbouring rows of one forward pass that belong to one request.

    Attributes:
        slot: The request's row in the tables.
        start: First row in the flattened batch.
        count: Number of rows.
        pending: Rows of a correction pass, whose tokens count only once they are accepted.
    """

    slot: int
    start: int
    count: int
    pending: bool


class NeuronStatistics:
    """Per-request activation energy of every FFN neuron of the model.

    Neurons of all layers lie one after the other in the last dimension; `layer_view` cuts one layer out.

    Args:
        layer_sizes: Neurons per FFN layer on this rank.
        num_slots: Most requests at a time.
        max_pending_rows: Most rows of correction passes that wait for their verdict in one step. Requests beyond that
            skip one refresh.
        device: Where the tables live.
        decay: Factor per token by which older activations fade; 1 weighs all tokens alike, as GRIFFIN does.
    """

    def __init__(
        self,
        layer_sizes: Sequence[int],
        num_slots: int,
        max_pending_rows: int,
        device: torch.device,
        decay: float = REFRESH_DECAY,
    ) -> None:
        self.decay = decay
        self.layer_sizes = tuple(layer_sizes)
        self.offsets = [sum(self.layer_sizes[:i]) for i in range(len(self.layer_sizes))]
        total = sum(self.layer_sizes)
        self.energy = torch.zeros(num_slots, total, device=device)
        self.prior = torch.ones(total, device=device)
        self._pending = torch.zeros(max_pending_rows, total, dtype=torch.bfloat16, device=device)
        self._weight = [0.0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._pending_start: dict[int, tuple[int, int]] = {}
        self._direct_slots: list[int] = []
        self._direct: torch.Tensor | None = None
        self._pending_rows: torch.Tensor | None = None
        for offset, size in zip(self.offsets, self.layer_sizes, strict=True):
            self.prior[offset : offset + size] /= size

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.numel() * table.element_size() for table in (self.energy, self.prior, self._pending))

    @property
    def observing(self) -> bool:
        """Whether the next forward pass has rows to observe."""
        return self._direct is not None or self._pending_rows is not None

    def acquire(self, cached_tokens: int = 0) -> int | None:
        """Gives a new request a slot, empty or lent the model-wide prior.

        Args:
            cached_tokens: Prompt tokens that came from the prefix cache and are never run for this request.

        Returns:
            The slot, or ``None`` when all are taken.
        """
        if not self._free:
            return None
        slot = self._free.pop()
        self.reset(slot, cached_tokens)
        return slot

    def reset(self, slot: int, cached_tokens: int = 0) -> None:
        """Starts a slot afresh, for a new request or one that was preempted. Arguments as in `acquire`."""
        weight = min(float(cached_tokens), PRIOR_TOKENS)
        torch.mul(self.prior, weight, out=self.energy[slot])
        self._weight[slot] = weight
        self._pending_start.pop(slot, None)

    def release(self, slot: int) -> None:
        """Returns a finished request's slot."""
        assert slot not in self._free
        self._pending_start.pop(slot, None)
        self._free.append(slot)

    def begin_step(self, runs: Sequence[ObservedRows]) -> None:
        """Says which rows of the coming forward pass belong to which request.

        Args:
            runs: Rows to observe; rows in no run are ignored (padding, requests without Sirius).
        """
        self._pending_start.clear()
        direct = [run for run in runs if not run.pending]
        waiting: list[int] = []
        for run in runs:
            if run.pending and len(waiting) + run.count <= self._pending.shape[0]:
                self._pending_start[run.slot] = (len(waiting), run.count)
                waiting.extend(range(run.start, run.start + run.count))
        device = self.energy.device
        self._pending_rows = torch.tensor(waiting, device=device) if waiting else None
        self._direct, self._direct_slots = None, [run.slot for run in direct]
        if direct:
            end = max(run.start + run.count for run in direct)
            self._direct = torch.zeros(len(direct), end, device=device)
            for row, run in enumerate(direct):
                self._direct[row, run.start : run.start + run.count] = self._fade(run.slot, run.count)

    def end_step(self) -> None:
        """Stops observing: forward passes until the next `begin_step` leave no trace."""
        self._direct = self._pending_rows = None

    def observe(self, layer: int, activation: torch.Tensor) -> None:
        """Adds one layer's activations of the current forward pass.

        Args:
            layer: Index of the FFN.
            activation: ``act(gate) * up``, ``[..., num_tokens, neurons]``; rows beyond the announced ones are ignored.
        """
        activation = activation.view(-1, activation.shape[-1])
        view = slice(self.offsets[layer], self.offsets[layer] + self.layer_sizes[layer])
        if self._direct is not None:
            energy = _token_energy(activation[: self._direct.shape[1]])
            slots = torch.tensor(self._direct_slots, device=energy.device)
            self.energy[:, view].index_add_(0, slots, self._direct @ energy)
        if self._pending_rows is not None:
            energy = _token_energy(activation[self._pending_rows])
            self._pending[: energy.shape[0], view] = energy

    def commit(self, slot: int, num_emitted: int) -> None:
        """Counts the rows of a correction pass that turned out to be part of the text.

        Args:
            slot: The request.
            num_emitted: Tokens the pass emitted: its first ``num_emitted`` rows are the text, the rest was rejected.
        """
        start, count = self._pending_start.pop(slot, (0, 0))
        kept = min(num_emitted, count)
        if kept == 0:
            return
        weights = self._fade(slot, kept)
        self.energy[slot].add_(weights @ self._pending[start : start + kept].float())

    def _fade(self, slot: int, count: int) -> torch.Tensor:
        """Makes room for `count` new tokens in a slot: fades what is there, returns the weights of the new ones."""
        weights = self.decay ** torch.arange(count - 1, -1, -1, device=self.energy.device, dtype=torch.float32)
        self.energy[slot].mul_(self.decay**count)
        self._weight[slot] = self._weight[slot] * self.decay**count + float(weights.sum())
        return weights

    def learn_prior(self, slot: int) -> None:
        """Moves the model-wide prior towards a request whose prompt is complete."""
        self.prior.mul_(PRIOR_DECAY).add_(self._normalised(slot), alpha=1.0 - PRIOR_DECAY)

    def scores(self, slots: Sequence[int]) -> torch.Tensor:
        """Sums the requests' statistics, each normalised to the same total, so that no long prompt drowns the others.

        Args:
            slots: The running requests; an empty sequence gives the prior.

        Returns:
            ``float32 [neurons of all layers]``.
        """
        known = [slot for slot in slots if self._weight[slot] > 0.0]
        if not known:
            return self.prior.clone()
        weights = torch.tensor([1.0 / self._weight[slot] for slot in known], device=self.energy.device)
        return weights @ self.energy[known]

    def _normalised(self, slot: int) -> torch.Tensor:
        return self.energy[slot] / max(self._weight[slot], 1e-6)


def _token_energy(activation: torch.Tensor) -> torch.Tensor:
    energy = activation.float().square()
    return energy / energy.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
