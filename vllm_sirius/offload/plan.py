"""What stays in memory and what is streamed: fixed before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sirius.offload.errors import OffloadError

GB = 10**9


@dataclass(frozen=True)
class WeightSizes:
    """What the weights of a model take, in bytes.

    Attributes:
        copies: The draft's copies.
        kept: Weights that are never anywhere but in memory: norms, biases, layers that are not streamed.
        rows: Embeddings, of which a pass looks up a few rows; 0 if none can be looked up in the file.
        groups: The target's layers, in the order of a pass; at least one.
        head: Pieces of the lm_head, in the order in which they are read; none if it cannot be streamed.
    """

    copies: int
    kept: int
    rows: int
    groups: tuple[int, ...]
    head: tuple[int, ...] = ()


@dataclass(frozen=True)
class MemoryPlan:
    """Where each part of the weights lies.

    Never what was used last: a pass reads all groups in order, so that whatever is dropped last is wanted first.

    Attributes:
        sizes: The weights.
        resident: For each group whether it stays in memory.
        rows_in_memory: Whether the embeddings do.
        head_in_memory: Whether the lm_head does.
        num_buffers: Groups that memory is taken for to read into.
        budget: What the plan was to keep within.
    """

    sizes: WeightSizes
    resident: tuple[bool, ...]
    rows_in_memory: bool
    head_in_memory: bool
    num_buffers: int
    budget: int

    @property
    def streamed(self) -> list[int]:
        """Groups that a pass reads from the file; the pieces of a streamed head come after those of the layers."""
        count = len(self.resident)
        layers = [number for number, stays in enumerate(self.resident) if not stays]
        return layers + ([] if self.head_in_memory else list(range(count, count + len(self.sizes.head))))

    @property
    def num_streamed_layers(self) -> int:
        """Groups of layers among those that are streamed."""
        return len(self.resident) - sum(self.resident)

    @property
    def streamed_bytes(self) -> int:
        """What a pass reads from the file."""
        return sum(self._streamed_sizes)

    @property
    def buffer_bytes(self) -> int:
        """Memory that is read into."""
        sizes = self._streamed_sizes
        return min(self.num_buffers, len(sizes)) * max(sizes, default=0)

    @property
    def memory_bytes(self) -> int:
        """Memory that the weights take."""
        layers = sum(size for size, stays in zip(self.sizes.groups, self.resident, strict=True) if stays)
        return self.sizes.copies + self.kept_bytes + self.buffer_bytes + layers

    @property
    def kept_bytes(self) -> int:
        """Memory of all that is no layer, copy or buffer."""
        rows = self.sizes.rows if self.rows_in_memory else 0
        return self.sizes.kept + rows + (sum(self.sizes.head) if self.head_in_memory else 0)

    def __str__(self) -> str:
        """One line for a log."""
        count, streamed = len(self.resident), self.num_streamed_layers
        if not self.streamed:
            return f"all {count} layers fit into the budget of {self.budget / GB:.2f} GB: nothing is streamed"
        head = "" if self.head_in_memory else " and the lm_head"
        return (
            f"{count - streamed} of {count} layers stay in memory, a pass streams {streamed}{head} "
            f"({self.streamed_bytes / GB:.2f} GB) | memory for weights {self.memory_bytes / GB:.2f} GB of a budget of "
            f"{self.budget / GB:.2f}: draft {self.sizes.copies / GB:.2f}, {self._kept_names} {self.kept_bytes / GB:.2f}, "
            f"buffers {self.buffer_bytes / GB:.2f}"
        )

    @property
    def _kept_names(self) -> str:
        names = [*(["embeddings"] if self.rows_in_memory else []), *(["head"] if self.head_in_memory else []), "norms"]
        return ", ".join(names)

    @property
    def _streamed_sizes(self) -> list[int]:
        sizes = [*self.sizes.groups, *self.sizes.head]
        return [sizes[number] for number in self.streamed]


def plan_memory(sizes: WeightSizes, num_buffers: int, budget: int) -> MemoryPlan:
    """Keeps as much in memory as fits.

    All of it if it does. Otherwise embeddings are looked up in the file, which costs a pass next to nothing; then as many layers
    stay as fit, spread evenly, because reading gets ahead where one is computed that is not read; the head is streamed last.

    Args:
        sizes: The weights.
        num_buffers: Groups to read ahead into.
        budget: Bytes of memory for all of it.

    Returns:
        The plan.

    Raises:
        OffloadError: If the budget is below what is needed with everything streamed that can be.
    """
    count = len(sizes.groups)
    plans = [MemoryPlan(sizes, (True,) * count, True, True, num_buffers, budget)]
    for head_in_memory in (True, False) if sizes.head else (True,):
        for num_resident in range(count - 1, -1, -1):
            resident = tuple((i + 1) * num_resident // count > i * num_resident // count for i in range(count))
            plans.append(MemoryPlan(sizes, resident, sizes.rows == 0, head_in_memory, num_buffers, budget))
    for plan in plans:
        if plan.memory_bytes <= budget:
            return plan
    least = plans[-1]
    raise OffloadError(
        f"offload_budget_gb={budget / GB:.3g} is too little for this model: the draft's copies take {sizes.copies / GB:.2f} GB, "
        f"{least._kept_names} {least.kept_bytes / GB:.2f} and {num_buffers} buffers {least.buffer_bytes / GB:.2f}: give at "
        f"least {least.memory_bytes / GB + 0.005:.2f}, or serve a smaller model."
    )
