"""The target's linear layers on panels that are streamed from a file: wait for a matrix, multiply, release its group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_sirius.kernels.cpu.panel_linear import panel_linear
from vllm_sirius.offload.stream import StreamStatistics, WeightStream


@dataclass(frozen=True)
class StreamedMatrix:
    """One matrix of the target.

    Attributes:
        group: Its group among those that are streamed.
        start: Bytes of the group before it.
        shape: Its panels, ``[panels, pairs, 16, 2]``.
        num_outputs: Outputs of its layer.
    """

    group: int
    start: int
    shape: tuple[int, ...]
    num_outputs: int

    @property
    def end(self) -> int:
        """Bytes of the group up to its end."""
        panels, pairs, outputs, two = self.shape
        return self.start + panels * pairs * outputs * two * torch.bfloat16.itemsize


class StreamedTarget:
    """The streamed matrices of one target.

    The last matrix that a pass uses of a group releases it. Which one that is, is learnt from the pass before; at first it is the
    last one in the file. Where that is wrong the stream begins anew at the group: slow, and right.

    Args:
        matrices: All of them, in the order of the file.
    """

    def __init__(self, matrices: Sequence[StreamedMatrix]) -> None:
        self._matrices = list(matrices)
        self._last = {matrix.group: number for number, matrix in enumerate(matrices)}
        self._stream: WeightStream | None = None
        self._running: tuple[int, int] | None = None

    def open(self, stream: WeightStream) -> None:
        """From now on the matrices can be used.

        Args:
            stream: Reads the groups.
        """
        self._stream = stream

    def run(self, number: int, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Runs a linear layer.

        Args:
            number: Its matrix.
            inputs: ``bfloat16 [..., in]``.
            bias: ``[out]`` or ``None``.

        Returns:
            ``bfloat16 [..., out]``.

        Raises:
            OffloadError: If the matrix cannot be had.
        """
        matrix, stream = self._matrices[number], self._stream
        assert stream is not None, "the target's weights are not on the disk yet"
        self._learn(number, matrix.group)
        slot = stream.wait(matrix.group, matrix.end)
        weights = slot[matrix.start : matrix.end].view(torch.bfloat16).view(matrix.shape)
        output = panel_linear(inputs, weights, matrix.num_outputs, bias)
        if number == self._last[matrix.group]:
            stream.release(matrix.group)
        return output

    def run_pieces(self, numbers: Sequence[int], inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Runs a linear layer whose outputs are spread over several matrices.

        Args:
            numbers: Its matrices, in the order of the outputs.
            inputs: ``bfloat16 [..., in]``.
            bias: ``[out]`` or ``None``.

        Returns:
            ``bfloat16 [..., out]``.

        Raises:
            OffloadError: If a matrix cannot be had.
        """
        sizes = [self._matrices[number].num_outputs for number in numbers]
        parts = [None] * len(numbers) if bias is None else bias.split(sizes)
        return torch.cat([self.run(number, inputs, part) for number, part in zip(numbers, parts, strict=True)], dim=-1)

    def statistics(self) -> StreamStatistics:
        """What was read so far."""
        return self._stream.statistics() if self._stream is not None else StreamStatistics(0, 0.0, 0.0, 0)

    @property
    def num_bytes(self) -> int:
        """Memory that is read into."""
        return self._stream.num_bytes if self._stream is not None else 0

    def close(self) -> None:
        """Ends reading."""
        if self._stream is not None:
            self._stream.close()

    def _learn(self, number: int, group: int) -> None:
        if self._running is not None and self._running[0] != group:
            before, last = self._running
            self._last[before] = last
        self._running = (group, number)
