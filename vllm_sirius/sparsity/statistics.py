"""The flocking statistic of GRIFFIN, kept per request, refreshed from verification passes.

For a token with FFN activation ``z`` (``act(gate) * up``, before the down projection) the statistic adds
``(z / ||z||)**2`` to the row of the token's request, after the row has faded by a decay. Without decay the sum over a
prompt is the square of GRIFFIN's ``s`` (arXiv 2404.01365), which has the same order.

All tables are allocated once. A request owns one *slot*, a row of the tables, from its first token to its end. What
depends on the verdict of the target (`commit`, `scores`) takes and keeps tensors, so it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_sirius.sparsity.observation import ObservationPlan, ObservedRows

REFRESH_DECAY = 0.97
"""Factor per token by which older activations fade where the set is refreshed: a memory of about 33 tokens."""

PRIOR_DECAY = 0.9
"""Factor per finished prompt by which the model-wide prior fades."""

PRIOR_TOKENS = 16.0
"""Most tokens of weight that the prior lends a request whose prompt came from the prefix cache."""

ObserveKernel = Callable[..., None]
"""Device kernel of `NeuronStatistics.observe`: (activation, token_slot, token_weight, token_pending, energy, pending,
offset); the twin is `NeuronStatistics._observe_on_host`."""


class NeuronStatistics:
    """Per-request activation energy of every FFN neuron of the model.

    Neurons of all layers lie one after the other in the last dimension.

    Attributes:
        tables: Energy of every slot, ``float32 [num_slots + 1, neurons]``; the last row takes what belongs to nobody.
        weight: Tokens' weight that each slot holds, ``float32 [num_slots + 1]``; the last stays 0.
        prior: What all prompts had in common, ``float32 [neurons]``.

    Args:
        layer_sizes: Neurons per FFN layer on this rank.
        num_slots: Most requests at a time.
        max_pending_rows: Most rows of verification passes that wait for their verdict in one step. Requests beyond that
            skip one refresh.
        device: Where the tables live.
        decay: Factor per token by which older activations fade; 1 weighs all tokens alike, as GRIFFIN does.
        max_tokens: Most tokens of a forward pass, where `kernel` reads the plan on the device.
        kernel: Observes on the device, safe in captured graphs; without one PyTorch does, which is not.
    """

    def __init__(
        self,
        layer_sizes: Sequence[int],
        num_slots: int,
        max_pending_rows: int,
        device: torch.device,
        decay: float = REFRESH_DECAY,
        max_tokens: int = 0,
        kernel: ObserveKernel | None = None,
    ) -> None:
        self.decay = decay
        self.layer_sizes = tuple(layer_sizes)
        self.offsets = [sum(self.layer_sizes[:i]) for i in range(len(self.layer_sizes))]
        self.num_slots = num_slots
        total = sum(self.layer_sizes)
        self.tables = torch.zeros(num_slots + 1, total, device=device)
        self.weight = torch.zeros(num_slots + 1, device=device)
        self.prior = torch.empty(total, device=device)
        self._forget_prior()
        self._pending = torch.zeros(max_pending_rows, total, dtype=torch.bfloat16, device=device)
        # First row and number of rows of each slot in the pending table.
        self._pending_place = torch.zeros(2, num_slots + 1, dtype=torch.int64, device=device)
        self._free = list(range(num_slots - 1, -1, -1))
        self._plan = ObservationPlan(max_tokens if kernel is not None else 0, device)
        self._kernel = kernel
        self._num_pending = 0
        self._observing = False

    @property
    def energy(self) -> torch.Tensor:
        """Energy of every slot, ``float32 [num_slots, neurons]``."""
        return self.tables[: self.num_slots]

    @property
    def nobody(self) -> int:
        """The slot that stands for no request in `commit` and `scores`."""
        return self.num_slots

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.numel() * table.element_size() for table in (self.tables, self.prior, self._pending))

    @property
    def observing(self) -> bool:
        """Whether a forward pass must show its activations: always with a kernel, whose launches graphs record."""
        return self._kernel is not None or self._observing

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
        torch.mul(self.prior, weight, out=self.tables[slot])
        self.weight[slot] = weight
        self._pending_place[1, slot] = 0

    def forget(self) -> None:
        """Forgets all that activations taught, because the weights are others now; running requests keep their slots."""
        self.tables.zero_()
        self.weight.zero_()
        self._pending_place.zero_()
        self._forget_prior()

    def _forget_prior(self) -> None:
        for offset, size in zip(self.offsets, self.layer_sizes, strict=True):
            self.prior[offset : offset + size] = 1.0 / size

    def release(self, slot: int) -> None:
        """Returns a finished request's slot."""
        assert slot not in self._free
        self._free.append(slot)

    def begin_step(self, runs: Sequence[ObservedRows]) -> None:
        """Says which rows of the coming forward pass belong to which request.

        Args:
            runs: Rows to observe; rows in no run are ignored (padding, requests without Sirius).
        """
        direct = []
        waiting: list[ObservedRows] = []
        places: list[tuple[int, int, int]] = []
        num_waiting = 0
        for run in runs:
            if not run.pending:
                direct.append((run, self._fade(run.slot, run.count)))
            elif num_waiting + run.count <= self._pending.shape[0]:
                places.append((run.slot, num_waiting, run.count))
                waiting.append(run)
                num_waiting += run.count
        self._pending_place[1].zero_()
        if places:
            slots, *rest = _to_device(torch.tensor(places).t().contiguous(), self.tables.device)
            self._pending_place[:, slots] = torch.stack(rest)
        self._plan.set(direct, waiting)
        self._num_pending = num_waiting
        self._observing = bool(runs)

    def end_step(self) -> None:
        """Stops observing on the host. With a kernel, a pass that must leave no trace begins a step without rows."""
        self._observing = False

    def observe(self, layer: int, activation: torch.Tensor) -> None:
        """Adds one layer's activations of the current forward pass.

        Args:
            layer: Index of the FFN.
            activation: ``act(gate) * up``, ``[..., num_tokens, neurons]``; rows beyond the announced ones are ignored.
        """
        activation = activation.view(-1, activation.shape[-1])
        if self._kernel is None:
            if self._observing:
                self._observe_on_host(layer, activation)
            return
        num_tokens = activation.shape[0]
        plan = self._plan
        self._kernel(
            activation,
            plan.token_slot[:num_tokens],
            plan.token_weight[:num_tokens],
            plan.token_pending[:num_tokens],
            self.tables,
            self._pending,
            self.offsets[layer],
        )

    def _observe_on_host(self, layer: int, activation: torch.Tensor) -> None:
        view = slice(self.offsets[layer], self.offsets[layer] + self.layer_sizes[layer])
        plan = self._plan
        for run, weights in plan.direct:
            energy = token_energy(activation[run.start : run.start + run.count])
            self.tables[run.slot, view] += weights @ energy
        if plan.pending_rows:
            self._pending[: len(plan.pending_rows), view] = token_energy(activation[plan.pending_rows])

    def commit(self, slots: torch.Tensor, num_emitted: torch.Tensor) -> None:
        """Counts the rows of the last verification pass that turned out to be part of the text.

        Args:
            slots: The requests, ``int64 [n]``, each at most once; `nobody` for rows without one.
            num_emitted: Tokens the pass emitted for each, ``int [n]``: its first ``num_emitted`` rows are the text, the
                rest was rejected. Requests without pending rows are left as they are.
        """
        num_rows = self._num_pending
        if num_rows == 0:
            return
        first, count = self._pending_place[:, slots]
        kept = torch.minimum(num_emitted.to(count.dtype), count).unsqueeze(1)
        place = torch.arange(num_rows, device=slots.device) - first.unsqueeze(1)
        counted = (place >= 0) & (place < kept)
        weights = torch.where(counted, self.decay ** (kept - 1 - place).clamp_min(0).float(), 0.0)
        fade = self.decay ** kept.float()
        # A copy of the pending rows in fp32 would double the largest table of a GPU.
        dtype = torch.float32 if self._pending.device.type == "cpu" else self._pending.dtype
        added = (weights.to(dtype) @ self._pending[:num_rows].to(dtype)).float()
        self.tables.index_copy_(0, slots, self.tables[slots] * fade + added)
        self.weight.index_copy_(0, slots, self.weight[slots] * fade.squeeze(1) + weights.sum(dim=1))
        self._pending_place[1].index_fill_(0, slots, 0)

    def _fade(self, slot: int, count: int) -> torch.Tensor:
        """Makes room for `count` new tokens in a slot: fades what is there, returns the weights of the new ones."""
        weights = [self.decay**age for age in range(count - 1, -1, -1)]
        self.tables[slot].mul_(self.decay**count)
        self.weight[slot].mul_(self.decay**count).add_(sum(weights))
        return torch.tensor(weights)

    def learn_prior(self, slot: int) -> None:
        """Moves the model-wide prior towards a request whose prompt is complete."""
        known = self.tables[slot] / self.weight[slot].clamp_min(1e-6)
        self.prior.mul_(PRIOR_DECAY).add_(known, alpha=1.0 - PRIOR_DECAY)

    def scores(self, slots: torch.Tensor) -> torch.Tensor:
        """Sums the requests' statistics, each normalised to the same total, so that no long prompt drowns the others.

        Args:
            slots: The running requests, ``int64 [n]``; `nobody` for rows without one.

        Returns:
            ``float32 [neurons of all layers]``; the prior if nothing is known of any of them.
        """
        weight = self.weight[slots]
        inverse = torch.where(weight > 0.0, 1.0 / weight.clamp_min(1e-30), 0.0)
        return torch.where((weight > 0.0).any(), inverse @ self.tables[slots], self.prior)


def token_energy(activation: torch.Tensor) -> torch.Tensor:
    """Share of each neuron in a token's activation energy.

    Args:
        activation: ``[num_tokens, neurons]``.

    Returns:
        ``z**2 / ||z||**2``, ``float32 [num_tokens, neurons]``; zeros for a token without any.
    """
    energy = activation.float().square()
    return energy / energy.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
