"""What computes the reduced FFNs of a model by native kernels: one object that knows the weights of all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.kernels.cpu.kernels import coarse_ffn, fine_ffn
from vllm_sirius.kernels.cpu.low_bit_kernels import low_bit_coarse_ffn, low_bit_fine_ffn
from vllm_sirius.kernels.cpu.low_bit_panel_kernels import panels_ffn
from vllm_sirius.kernels.triton import kernels as triton_kernels
from vllm_sirius.sparsity.coarse import num_kept_neurons
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels
from vllm_sirius.weights.rows import rows_read

Rows = torch.Tensor | LowBitRows


class Backend(Protocol):
    """Native kernels bound to the weights of a model's FFNs.

    Attributes:
        max_tokens: Largest batch that these kernels take.
        num_bytes: Memory that the draft's own copies of weights take, 0 where it reads the target's.
        max_error: Largest relative difference from the model's own FFNs that rounding explains.
    """

    max_tokens: int
    num_bytes: int
    max_error: float

    def whole(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs the FFN of one layer with all its neurons, in the weights that the draft reads.

        Args:
            layer: Index of the FFN.
            hidden_states: ``[num_tokens, hidden_size]``.

        Returns:
            ``[num_tokens, hidden_size]``.
        """

    def draft_bytes(self, density: float, sparsity: str) -> int:
        """Bytes of weights that a draft step of one token reads in all FFNs.

        Args:
            density: Part of the neurons that the draft keeps.
            sparsity: ``coarse``, ``fine`` or ``none``.
        """


class CoarseBackend(Backend, Protocol):
    """Kernels for coarse sparsity."""

    def coarse(self, layer: int, hidden_states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Runs the FFN of one layer with some of its neurons.

        Args:
            layer: Index of the FFN.
            hidden_states: ``[num_tokens, hidden_size]``.
            indices: The neurons to keep, ascending, ``int32 [kept]``.

        Returns:
            ``[num_tokens, hidden_size]``.
        """


class FineBackend(Backend, Protocol):
    """Kernels for fine sparsity."""

    def fine(self, layer: int, hidden_states: torch.Tensor, num_kept: int) -> torch.Tensor:
        """Runs the FFN of one layer with each token's largest gates.

        Args:
            layer: Index of the FFN.
            hidden_states: ``[num_tokens, hidden_size]``.
            num_kept: Neurons that each token keeps.

        Returns:
            ``[num_tokens, hidden_size]``.
        """


class _RowsBackend:
    """Rows of all FFNs, plain or rounded."""

    def __init__(self, ffns: Sequence[GatedFFN], rows: Sequence[Rows]) -> None:
        self._rows = tuple(rows)
        self._activations = [_known(ffn) for ffn in ffns]
        first = self._rows[0]
        if isinstance(first, LowBitRows):
            self.max_tokens = 32
            self.max_error = 0.05 if first.bits == 8 else 0.5
        else:
            self.max_tokens, self.max_error = 16, 0.03
        self._num_neurons = [ffn.num_neurons for ffn in ffns]
        self.num_bytes = sum(map(_bytes_of, self._rows))

    def draft_bytes(self, density: float, sparsity: str) -> int:
        """See `Backend.draft_bytes`."""
        return sum(
            _bytes_read(_bytes_of(rows), size, density, sparsity)
            for rows, size in zip(self._rows, self._num_neurons, strict=True)
        )


class CoarseRowsBackend(_RowsBackend):
    """The C++ kernels on copies of the weights by neuron.

    Args:
        ffns: The FFNs, each with an activation that the kernels know.
        rows: Weights of each, ``[neurons, 3, hidden_size]`` (`weights.by_neuron`).
    """

    def whole(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `Backend.whole`."""
        rows = self._rows[layer]
        if isinstance(rows, LowBitRows):
            return low_bit_coarse_ffn(hidden_states, rows, None, self._activations[layer])
        return self.coarse(layer, hidden_states, torch.arange(rows.shape[0], dtype=torch.int32))

    def coarse(self, layer: int, hidden_states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """See `CoarseBackend.coarse`."""
        rows = self._rows[layer]
        if isinstance(rows, LowBitRows):
            return low_bit_coarse_ffn(hidden_states, rows, indices, self._activations[layer])
        return coarse_ffn(hidden_states, rows, indices, self._activations[layer])


class FineRowsBackend(_RowsBackend):
    """The C++ kernels for fine sparsity on copies of the weights.

    Args:
        ffns: The FFNs, each with an activation that the kernels know.
        rows: Weights of each, ``[3 * neurons, hidden_size]`` (`weights.gates_first`).
    """

    def whole(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `Backend.whole`."""
        return self.fine(layer, hidden_states, self._num_neurons[layer])

    def fine(self, layer: int, hidden_states: torch.Tensor, num_kept: int) -> torch.Tensor:
        """See `FineBackend.fine`."""
        rows = self._rows[layer]
        if isinstance(rows, LowBitRows):
            return low_bit_fine_ffn(hidden_states, rows, num_kept, self._activations[layer])
        return fine_ffn(hidden_states, rows, num_kept, self._activations[layer])


class LowBitPanelsBackend:
    """The C++ kernels on 4-bit panels, for drafts that keep all neurons.

    Args:
        ffns: The FFNs, each with an activation that the kernels know.
        weights: Of each, the panels of gate and up by turns, and the down projection.
        max_tokens: Largest draft step that runs on them.
    """

    max_error = 0.5

    def __init__(
        self, ffns: Sequence[GatedFFN], weights: Sequence[tuple[torch.Tensor, LowBitPanels]], max_tokens: int = 32
    ) -> None:
        self.max_tokens = max_tokens
        self._weights = tuple(weights)
        self._activations = [_known(ffn) for ffn in ffns]
        self.num_bytes = sum(gate_up.nbytes + down.num_bytes for gate_up, down in self._weights)

    def draft_bytes(self, density: float, sparsity: str) -> int:
        """See `Backend.draft_bytes`."""
        return self.num_bytes

    def whole(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `Backend.whole`."""
        return panels_ffn(hidden_states, *self._weights[layer], self._activations[layer])


class TritonBackend:
    """The Triton kernels on the target's own weights: nothing is stored twice.

    Args:
        ffns: The FFNs, each with an activation that the kernels know.
        gate_up: Merged projection of each, ``[2 * neurons, hidden_size]``.
        down_rows: Down projection of each by neuron, ``[neurons, hidden_size]``.
        reductions: What makes a whole output of this rank's part, or ``None`` where it is whole.
    """

    max_tokens = 32
    num_bytes = 0
    max_error = 0.03

    def __init__(
        self,
        ffns: Sequence[GatedFFN],
        gate_up: Sequence[torch.Tensor],
        down_rows: Sequence[torch.Tensor],
        reductions: Sequence[Callable[[torch.Tensor], torch.Tensor] | None],
    ) -> None:
        self._weights = list(zip(gate_up, down_rows, strict=True))
        self._activations = [_known(ffn) for ffn in ffns]
        self._gate_first = [ffn.gate_first for ffn in ffns]
        self._reductions = tuple(reductions)

    def draft_bytes(self, density: float, sparsity: str) -> int:
        """See `Backend.draft_bytes`."""
        return sum(
            _bytes_read(gate_up.nbytes + down_rows.nbytes, down_rows.shape[0], density, sparsity)
            for gate_up, down_rows in self._weights
        )

    def whole(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `Backend.whole`."""
        num_neurons, device = self._weights[layer][1].shape[0], hidden_states.device
        return self.coarse(layer, hidden_states, torch.arange(num_neurons, dtype=torch.int32, device=device))

    def coarse(self, layer: int, hidden_states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """See `CoarseBackend.coarse`."""
        output = triton_kernels.coarse_ffn(
            hidden_states, *self._weights[layer], indices, self._activations[layer], self._gate_first[layer]
        )
        return self._whole(layer, output)

    def fine(self, layer: int, hidden_states: torch.Tensor, num_kept: int) -> torch.Tensor:
        """See `FineBackend.fine`."""
        output = triton_kernels.fine_ffn(
            hidden_states, *self._weights[layer], num_kept, self._activations[layer], self._gate_first[layer]
        )
        return self._whole(layer, output)

    def warm_up(self, density: float, fine: bool) -> None:
        """Compiles and tunes the kernels for every shape of FFN in the model; before any graph is captured.

        Args:
            density: Part of the neurons the draft keeps.
            fine: Whether sparsity is fine.
        """
        done = set()
        for layer, (gate_up, down_rows) in enumerate(self._weights):
            key = (down_rows.shape, self._activations[layer], self._gate_first[layer])
            if key not in done:
                done.add(key)
                triton_kernels.warm_up(
                    gate_up,
                    down_rows,
                    num_kept_neurons(density, down_rows.shape[0]),
                    self._activations[layer],
                    fine=fine,
                    gate_first=self._gate_first[layer],
                )

    def _whole(self, layer: int, output: torch.Tensor) -> torch.Tensor:
        reduce = self._reductions[layer]
        return output if reduce is None else reduce(output)


def _bytes_of(rows: Rows) -> int:
    return rows.num_bytes if isinstance(rows, LowBitRows) else rows.nbytes


def _bytes_read(num_bytes: int, num_neurons: int, density: float, sparsity: str) -> int:
    """Part of an FFN's rows, which take `num_bytes` and are all of one size."""
    return num_bytes // (3 * num_neurons) * rows_read(num_neurons, density, sparsity)


def _known(ffn: GatedFFN) -> str:
    assert ffn.activation is not None
    return ffn.activation
