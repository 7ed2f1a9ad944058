"""A pass of the target whose layers come from the host, each into the buffer that has been free for longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.offload.layers import Matrices, dense, run_layer
from benchmarks.gpu.offload.queues import Queue, Queues
from benchmarks.gpu.shapes import Shape


@dataclass
class State:
    """What goes from layer to layer.

    Attributes:
        hidden: ``[tokens, hidden]``; that of the last layer once the queue of layers is done.
    """

    hidden: torch.Tensor


class LayerStream:
    """Streams layers through a few buffers on the device.

    Args:
        shape: Sizes and number of layers.
        host: Layers in the host's memory, pinned where the device is a GPU, ``[layer_elements(shape)]`` each. Layer *i* is
            ``host[i % len(host)]``, so a few distinct layers stand for all of them.
        buffers: Memory on the device, as many tensors as copies and layers may be apart, sized like those of `host`.
        queues: Where copies and layers run.
    """

    def __init__(
        self, shape: Shape, host: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], queues: Queues
    ) -> None:
        self.shape = shape
        self.queues = queues
        self._host = host
        self._buffers = buffers
        self._matrices: list[Matrices] = [dense(shape, buffer) for buffer in buffers]

    @property
    def num_bytes(self) -> int:
        """Bytes that a pass copies."""
        return self.shape.num_layers * self._buffers[0].nbytes

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """A pass.

        Args:
            hidden: ``[tokens, hidden]``.

        Returns:
            As `hidden`, behind the last layer.
        """
        state = State(hidden)
        self.enqueue(state)
        self.queues.finish()
        return state.hidden

    def enqueue(self, state: State) -> None:
        """Submits a pass: its copies begin when all layers submitted before are done.

        Args:
            state: Replaced layer by layer.
        """
        copy, compute = self.queues.copy, self.queues.compute
        copy.wait(compute.record())
        used: list[Any] = []
        for index in range(self.shape.num_layers):
            slot = index % len(self._buffers)
            if index >= len(self._buffers):
                # The last layer that read this buffer: a copy that begins before it is done changes its weights.
                copy.wait(used[index - len(self._buffers)])
            self._submit_copy(copy, index, slot)
            compute.wait(copy.record())
            self._submit_layer(slot, state)
            used.append(compute.record())

    def copy_only(self) -> None:
        """All copies of a pass without a layer: what the bus can do."""
        copy, compute = self.queues.copy, self.queues.compute
        copy.wait(compute.record())
        for index in range(self.shape.num_layers):
            self._submit_copy(copy, index, index % len(self._buffers))
        compute.wait(copy.record())
        self.queues.finish()

    def compute_only(self, hidden: torch.Tensor) -> torch.Tensor:
        """All layers of a pass on what is in the buffers: what computing costs where weights are on the device.

        Args:
            hidden: ``[tokens, hidden]``.
        """
        state = State(hidden)
        for index in range(self.shape.num_layers):
            self._submit_layer(index % len(self._buffers), state)
        self.queues.finish()
        return state.hidden

    def run_in_turn(self, hidden: torch.Tensor) -> torch.Tensor:
        """A pass with nothing at the same time, in one queue and through one buffer: what `run` must compute.

        Args:
            hidden: ``[tokens, hidden]``.
        """
        state, compute = State(hidden), self.queues.compute
        for index in range(self.shape.num_layers):
            self._submit_copy(compute, index, 0)
            self._submit_layer(0, state)
        self.queues.finish()
        return state.hidden

    def _submit_copy(self, queue: Queue, index: int, slot: int) -> None:
        source, buffer = self._host[index % len(self._host)], self._buffers[slot]
        queue.submit(lambda: buffer.copy_(source, non_blocking=True))

    def _submit_layer(self, slot: int, state: State) -> None:
        matrices = self._matrices[slot]

        def work() -> None:
            state.hidden = run_layer(self.shape, matrices, state.hidden)

        self.queues.compute.submit(work)
