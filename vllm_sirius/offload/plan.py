"""What stays in memory and what is streamed: fixed before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_sirius.offload.errors import OffloadError

GB = 10**9


@dataclass(frozen=True)
class MemoryPlan:
    """Where each group of the target's weights lies.

    Never what was used last: a pass reads all groups in order, so that whatever is dropped last is wanted first.

    Attributes:
        copies: Bytes of the draft's copies.
        kept: Bytes of weights that are never streamed: embeddings, lm_head, norms.
        groups: Bytes of each group, in the order of a pass.
        resident: For each group whether it stays in memory.
        num_buffers: Groups that memory is taken for to read into.
        budget: What the plan was to keep within.
    """

    copies: int
    kept: int
    groups: tuple[int, ...]
    resident: tuple[bool, ...]
    num_buffers: int
    budget: int

    @property
    def streamed(self) -> list[int]:
        """Groups that a pass reads from the file."""
        return [number for number, stays in enumerate(self.resident) if not stays]

    @property
    def streamed_bytes(self) -> int:
        """What a pass reads from the file."""
        return sum(self.groups[number] for number in self.streamed)

    @property
    def buffer_bytes(self) -> int:
        """Memory that is read into."""
        sizes = [self.groups[number] for number in self.streamed]
        return min(self.num_buffers, len(sizes)) * max(sizes, default=0)

    @property
    def memory_bytes(self) -> int:
        """Memory that the weights take."""
        return self.copies + self.kept + self.buffer_bytes + sum(self.groups) - self.streamed_bytes

    def __str__(self) -> str:
        """One line for a log."""
        count = len(self.streamed)
        if not count:
            return (
                f"all {len(self.groups)} layers fit into the budget of {self.budget / GB:.2f} GB: nothing is streamed"
            )
        return (
            f"{len(self.groups) - count} of {len(self.groups)} layers stay in memory, a pass streams {count} "
            f"({self.streamed_bytes / GB:.2f} GB) | memory for weights {self.memory_bytes / GB:.2f} GB of a budget of "
            f"{self.budget / GB:.2f}: draft {self.copies / GB:.2f}, embedding, head and norms {self.kept / GB:.2f}, buffers "
            f"{self.buffer_bytes / GB:.2f}"
        )


def plan_memory(groups: Sequence[int], copies: int, kept: int, num_buffers: int, budget: int) -> MemoryPlan:
    """Keeps as many groups in memory as fit, spread evenly: where one is computed that is not read, reading gets ahead.

    Args:
        groups: Bytes of each group, in the order of a pass; at least one.
        copies: Bytes of the draft's copies.
        kept: Bytes of weights that are never streamed.
        num_buffers: Groups to read ahead into.
        budget: Bytes of memory for all of it.

    Returns:
        The plan.

    Raises:
        OffloadError: If the budget is below what is needed with every group streamed.
    """
    count = len(groups)
    for num_resident in range(count, -1, -1):
        resident = tuple((i + 1) * num_resident // count > i * num_resident // count for i in range(count))
        plan = MemoryPlan(copies, kept, tuple(groups), resident, num_buffers, budget)
        if plan.memory_bytes <= budget:
            return plan
    least = plan.memory_bytes
    raise OffloadError(
        f"offload_budget_gb={budget / GB:.3g} is too little for this model: its int4 copies take {copies / GB:.2f} GB, "
        f"embedding, head and norms {kept / GB:.2f} and {plan.num_buffers} buffers {plan.buffer_bytes / GB:.2f}: give at least "
        f"{least / GB + 0.005:.2f}, or serve a smaller model."
    )
