"""Two queues of work, one for copies and one for layers, that wait for each other: on a GPU, and simulated."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Queue(Protocol):
    """Work that runs in the order in which it was submitted, while the caller goes on."""

    def submit(self, work: Callable[[], object]) -> None:
        """Appends work."""

    def record(self) -> Any:
        """Returns a mark that is reached when everything submitted so far is done."""

    def wait(self, mark: Any) -> None:
        """Holds everything submitted from now on until a mark, of either queue, is reached."""


class Queues(Protocol):
    """A queue for copies and one for layers."""

    @property
    def copy(self) -> Queue:
        """Copies from host to device."""

    @property
    def compute(self) -> Queue:
        """Layers."""

    def finish(self) -> None:
        """Makes the results of everything submitted visible to the caller's next operation."""


class CudaQueue:
    """A CUDA stream.

    Args:
        stream: Where the work runs.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def submit(self, work: Callable[[], object]) -> None:
        """See `Queue`."""
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> torch.cuda.Event:
        """See `Queue`."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Queue`."""
        self._stream.wait_event(mark)


class CudaQueues:
    """A stream of its own for copies; layers run on the current stream, so events timed there enclose them."""

    def __init__(self) -> None:
        self.copy = CudaQueue(torch.cuda.Stream())
        self.compute = CudaQueue(torch.cuda.current_stream())

    def finish(self) -> None:
        """Nothing to do: what the caller runs next is ordered behind the layers on the same stream."""


Choose = Callable[[Sequence["SimulatedQueue"]], "SimulatedQueue"]
"""Picks the queue that runs its next piece of work, among those that have one and need not wait."""


@dataclass(eq=False)
class SimulatedQueue:
    """Pieces of work that `SimulatedQueues` runs later.

    Attributes:
        name: ``copy`` or ``compute``.
        owner: Whose marks and waits are counted.
        pending: Pieces of work, marks and waits, oldest first.
    """

    name: str
    owner: SimulatedQueues
    pending: deque[tuple[str, Any]] = field(default_factory=deque)

    def submit(self, work: Callable[[], object]) -> None:
        """See `Queue`."""
        self.pending.append(("work", work))

    def record(self) -> object:
        """See `Queue`."""
        mark = object()
        self.pending.append(("mark", mark))
        return mark

    def wait(self, mark: object) -> None:
        """See `Queue`."""
        if self.owner.is_wait_kept():
            self.pending.append(("wait", mark))

    def advance(self, reached: set[object]) -> bool:
        """Passes marks, and waits that are over; says whether work is next.

        Args:
            reached: Marks that were passed; extended.
        """
        while self.pending and self.pending[0][0] != "work":
            kind, mark = self.pending[0]
            if kind == "wait" and mark not in reached:
                return False
            if kind == "mark":
                reached.add(mark)
            self.pending.popleft()
        return bool(self.pending)

    def run_next(self) -> None:
        """Runs one piece of work."""
        self.pending.popleft()[1]()


class SimulatedQueues:
    """Runs copies and layers on the CPU in an order as unfavourable as the waits permit.

    A GPU promises nothing about two streams but what events enforce. An order that copies as early as it may overwrites
    every buffer whose reader is not awaited; one that computes as early as it may reads every buffer that is not loaded yet.

    Args:
        choose: The order.
        dropped_waits: Numbers of waits, counted from 0 over both queues, that are left out, to see that something notices.
    """

    def __init__(self, choose: Choose, dropped_waits: Collection[int] = ()) -> None:
        self.copy = SimulatedQueue("copy", self)
        self.compute = SimulatedQueue("compute", self)
        self.num_waits = 0
        self._choose = choose
        self._dropped_waits = dropped_waits
        self._reached: set[object] = set()

    def is_wait_kept(self) -> bool:
        """Counts a wait; says whether it is kept."""
        self.num_waits += 1
        return self.num_waits - 1 not in self._dropped_waits

    def finish(self) -> None:
        """Runs everything.

        Raises:
            RuntimeError: If both queues wait for each other.
        """
        queues = (self.copy, self.compute)
        while ready := self._ready(queues):
            self._choose(ready).run_next()
        if any(queue.pending for queue in queues):
            raise RuntimeError("Copies and layers wait for each other.")

    def _ready(self, queues: Sequence[SimulatedQueue]) -> list[SimulatedQueue]:
        while True:
            before = len(self._reached)
            ready = [queue for queue in queues if queue.advance(self._reached)]
            # A mark that one queue has passed may have ended a wait of the other.
            if len(self._reached) == before:
                return ready


def prefer(name: str) -> Choose:
    """An order in which one queue, ``copy`` or ``compute``, runs as far ahead as waits permit."""
    return lambda ready: next((queue for queue in ready if queue.name == name), ready[0])


def shuffled(seed: int) -> Choose:
    """A random order."""
    return random.Random(seed).choice
