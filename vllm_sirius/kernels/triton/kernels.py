"""The reduced FFNs on CUDA. They compute what `vllm_sirius.kernels.triton.reference` does.

Weights lie as the target keeps them, so nothing is stored twice: `gate_up` is vLLM's merged weight, `down_rows` holds the
down projection by neuron, ``[neurons, hidden]``, of which the target reads the transposed view. Any hidden size and number
of neurons will do; multiples of 8 are read fastest.

Nothing on the way waits for the device or depends on its results, so calls can be captured in CUDA graphs. Temporary
tensors come from PyTorch's allocator, which gives a captured graph addresses of its own. Results are the same in every run
with the same tiles.

Call `warm_up` once before serving and before any capture: it compiles, and measures the fastest tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.triton import tuning
from vllm_sirius.kernels.triton.arguments import check_arguments, describe
from vllm_sirius.kernels.triton.projection import (
    down_kernel,
    gate_kernel,
    gate_up_kernel,
    sum_parts_kernel,
    up_kernel,
)
from vllm_sirius.kernels.triton.runtime import INTERPRETED
from vllm_sirius.kernels.triton.selection import keep_largest_kernel, list_kept_kernel
from vllm_sirius.kernels.triton.streaming import stream_coarse_kernel, stream_fine_kernel, sum_programs_kernel
from vllm_sirius.kernels.triton.tuning import (
    Tiles,
    Tuner,
    down_candidates,
    num_multiprocessors,
    row_candidates,
    stream_candidates,
    token_block,
)

_TUNER = Tuner()
_SUM_BLOCK = 512
_SUM_COLUMNS = 16
_SUM_PROGRAMS = 64


def coarse_ffn(
    inputs: torch.Tensor,
    gate_up: torch.Tensor,
    down_rows: torch.Tensor,
    indices: torch.Tensor,
    activation: Activation | str,
    gate_first: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a gated FFN with some of its neurons, the same for all tokens.

    Args:
        inputs: ``[tokens, hidden]``, bf16, fp16 or fp32.
        gate_up: ``[2 * neurons, hidden]``, contiguous, same dtype as `inputs`.
        down_rows: ``[neurons, hidden]``, contiguous, same dtype as `inputs`.
        indices: ``int32 [kept]``, contiguous, the neurons to keep, sorted and unique. Their values are not checked.
        activation: Activation of the gate.
        gate_first: Whether the gate is the first half of `gate_up`.
        out: Where to write, contiguous, shape and dtype of `inputs`.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.

    Raises:
        ValueError: If a shape, dtype, device or layout is not as above.
        TritonUnavailableError: If Triton cannot run here.
    """
    inputs, out = check_arguments(inputs, gate_up, down_rows, out)
    if indices.dtype != torch.int32 or indices.dim() != 1 or not indices.is_contiguous():
        raise ValueError(f"indices must be contiguous int32 [kept], not {describe(indices)}")
    if indices.numel() == 0 or out.numel() == 0:
        return out.zero_()
    activation = Activation(activation)
    num_tokens, hidden_size = inputs.shape
    num_neurons, num_kept = down_rows.shape[0], indices.shape[0]
    if _streams(inputs):
        tensors = (inputs, gate_up, down_rows, indices)
        sizes = (num_kept, num_neurons, hidden_size)
        constants = {"activation": activation.value, "gate_first": gate_first}
        return _stream(stream_coarse_kernel, tensors, sizes, out, **constants)

    def gate_and_up(tiles: Tiles) -> torch.Tensor:
        hidden = inputs.new_empty(num_tokens, num_kept)
        block = _block(tiles, num_tokens)
        gate_up_kernel[(_blocks(num_kept, tiles.rows // 2), _blocks(num_tokens, block))](
            inputs,
            gate_up,
            indices,
            hidden,
            num_tokens,
            num_kept,
            num_neurons,
            hidden_size,
            activation=activation.value,
            gate_first=gate_first,
            **_sizes(tiles, block),
        )
        return hidden

    hidden = _run_rows("gate_up", inputs, num_kept, gate_and_up)
    return _project_down(hidden, down_rows, indices, None, out)


def fine_ffn(
    inputs: torch.Tensor,
    gate_up: torch.Tensor,
    down_rows: torch.Tensor,
    num_kept: int,
    activation: Activation | str,
    gate_first: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a gated FFN in which every token keeps the neurons whose ``|act(gate)|`` is largest.

    Gate rows are read for all neurons, up and down rows for those that at least one token keeps. Of neurons of equal
    magnitude, compared in fp32, the one with the lower index is kept.

    Args:
        inputs: As in `coarse_ffn`, as all others but one.
        gate_up: ``[2 * neurons, hidden]``.
        down_rows: ``[neurons, hidden]``.
        num_kept: Neurons each token keeps, at most all.
        activation: Activation of the gate.
        gate_first: Whether the gate is the first half of `gate_up`.
        out: Where to write.

    Returns:
        ``[tokens, hidden]`` in the dtype of `inputs`; zeros if no neuron is kept.

    Raises:
        ValueError: If a shape, dtype, device or layout is not as above, or `num_kept` is out of range.
        TritonUnavailableError: If Triton cannot run here.
    """
    inputs, out = check_arguments(inputs, gate_up, down_rows, out)
    num_neurons = down_rows.shape[0]
    if not 0 <= num_kept <= num_neurons:
        raise ValueError(f"num_kept must lie in [0, {num_neurons}], not {num_kept}")
    if num_kept == 0 or out.numel() == 0:
        return out.zero_()
    gate, up = gate_up.split(num_neurons) if gate_first else gate_up.split(num_neurons)[::-1]
    activated = _activated_gate(inputs, gate, Activation(activation))
    indices, count = _keep_largest(activated, num_kept)
    if _streams(inputs):
        tensors = (inputs, up, down_rows, activated, indices)
        return _stream(stream_fine_kernel, tensors, (num_kept, inputs.shape[1]), out)
    hidden = _multiply_up(inputs, up, activated, indices, count)
    return _project_down(hidden, down_rows, indices, count, out)


def warm_up(
    gate_up: torch.Tensor,
    down_rows: torch.Tensor,
    num_kept: int,
    activation: Activation | str,
    *,
    fine: bool,
    token_counts: Sequence[int] = (1, 2, 32),
    gate_first: bool = True,
) -> None:
    """Compiles the kernels for one shape of FFN and measures the fastest tiles.

    Once for each shape, not for each layer; results stay in the process, compiled kernels in Triton's cache on disk. Never
    call it while a CUDA graph is captured. Under Triton's interpreter nothing is compiled or measured.

    Args:
        gate_up: ``[2 * neurons, hidden]`` of any layer of the shape.
        down_rows: ``[neurons, hidden]``.
        num_kept: Neurons to keep.
        activation: Activation of the gate.
        fine: Whether to prepare `fine_ffn`, or else `coarse_ffn`.
        token_counts: Batch sizes to prepare; 1, 2 to 16 and more share their tiles.
        gate_first: Whether the gate is the first half of `gate_up`.
    """
    if INTERPRETED:
        return
    # Spread over all neurons, as a selection is.
    indices = torch.arange(num_kept, device=down_rows.device) * down_rows.shape[0] // max(num_kept, 1)
    for count in sorted({token_block(count) for count in token_counts if count > 0}):
        inputs = torch.randn(count, down_rows.shape[1], device=down_rows.device).to(down_rows.dtype)
        with _TUNER.tuning():
            if fine:
                fine_ffn(inputs, gate_up, down_rows, num_kept, activation, gate_first)
            else:
                coarse_ffn(inputs, gate_up, down_rows, indices.to(torch.int32), activation, gate_first)
    torch.cuda.synchronize(down_rows.device)


def tuned_tiles() -> dict[tuple[Any, ...], Tiles]:
    """What `warm_up` measured to be fastest, by kernel and shape; for reports."""
    return _TUNER.chosen()


def _streams(inputs: torch.Tensor) -> bool:
    """Whether the FFN runs as one stream of neurons."""
    return inputs.shape[0] == 1 and inputs.shape[1] <= tuning.WIDEST_STREAM


def _stream(
    kernel: Any, tensors: tuple[torch.Tensor, ...], sizes: tuple[int, ...], out: torch.Tensor, **constants: Any
) -> torch.Tensor:
    """Runs one of the kernels of `streaming`: its tensors, its sizes, of which the first is `num_kept`, its constants."""
    inputs, num_kept, hidden_size = tensors[0], sizes[0], out.shape[1]

    def launch(tiles: Tiles) -> torch.Tensor:
        programs = min(tiles.parts * num_multiprocessors(inputs.device), _blocks(num_kept, tiles.rows))
        partial = torch.empty(programs, hidden_size, dtype=torch.float32, device=inputs.device)
        kernel[(programs,)](
            *tensors,
            partial,
            *sizes,
            **constants,
            block_rows=tiles.rows,
            block_columns=tiles.columns,
            stages=tiles.stages,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        sum_programs_kernel[(_blocks(hidden_size, _SUM_COLUMNS),)](
            partial, out, programs, hidden_size, block_programs=_SUM_PROGRAMS, block_columns=_SUM_COLUMNS
        )
        return out

    shape = (num_kept, hidden_size, inputs.dtype, bool(constants))
    return _TUNER.run("stream", shape, lambda: stream_candidates(hidden_size, inputs.dtype, inputs.device), launch)


def _activated_gate(inputs: torch.Tensor, gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    """fp32 ``act(gate)`` of all neurons, ``[tokens, neurons]``."""
    (num_tokens, hidden_size), num_neurons = inputs.shape, gate.shape[0]

    def launch(tiles: Tiles) -> torch.Tensor:
        activated = torch.empty(num_tokens, num_neurons, dtype=torch.float32, device=inputs.device)
        block = _block(tiles, num_tokens)
        gate_kernel[(_blocks(num_neurons, tiles.rows), _blocks(num_tokens, block))](
            inputs,
            gate,
            activated,
            num_tokens,
            num_neurons,
            hidden_size,
            activation=activation.value,
            **_sizes(tiles, block),
        )
        return activated

    return _run_rows("gate", inputs, num_neurons, launch)


def _keep_largest(activated: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroes what tokens drop; returns the neurons that some token keeps, ``int32``, and their count, ``int32 [1]``."""
    num_tokens, num_neurons = activated.shape
    max_kept = min(num_neurons, num_tokens * num_kept)
    indices = torch.empty(max_kept, dtype=torch.int32, device=activated.device)
    count = torch.empty(1, dtype=torch.int32, device=activated.device)
    block = 1 << (num_neurons - 1).bit_length()
    # 64 neurons per thread: fewer, and the warps wait longer for each other; more, and registers run out.
    warps = min(max(block // 2048, 4), 32)
    keep_largest_kernel[(num_tokens,)](
        activated,
        indices,
        count,
        num_kept,
        num_neurons,
        list_kept=num_tokens == 1,
        block_neurons=block,
        num_warps=warps,
    )
    if num_tokens > 1:
        list_kept_kernel[(1,)](activated, indices, count, num_tokens, num_neurons, block_neurons=block, num_warps=warps)
    return indices, count


def _multiply_up(
    inputs: torch.Tensor, up: torch.Tensor, activated: torch.Tensor, indices: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """``act(gate) * up`` of the listed neurons, ``[tokens, max_kept]`` in the dtype of the weights."""
    (num_tokens, hidden_size), max_kept = inputs.shape, indices.shape[0]

    def launch(tiles: Tiles) -> torch.Tensor:
        hidden = inputs.new_empty(num_tokens, max_kept)
        block = _block(tiles, num_tokens)
        up_kernel[(_blocks(max_kept, tiles.rows), _blocks(num_tokens, block))](
            inputs,
            up,
            activated,
            indices,
            count,
            hidden,
            num_tokens,
            max_kept,
            up.shape[0],
            hidden_size,
            **_sizes(tiles, block),
        )
        return hidden

    return _run_rows("up", inputs, up.shape[0], launch)


def _project_down(
    hidden: torch.Tensor,
    down_rows: torch.Tensor,
    indices: torch.Tensor,
    count: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Multiplies ``hidden [tokens, max_kept]`` with the listed rows, in parts that are then added up."""
    (num_tokens, max_kept), hidden_size = hidden.shape, down_rows.shape[1]

    def launch(tiles: Tiles) -> torch.Tensor:
        parts = min(tiles.parts, _blocks(max_kept, tiles.rows))
        partial = torch.empty(parts, num_tokens, hidden_size, dtype=torch.float32, device=hidden.device)
        block = _block(tiles, num_tokens)
        down_kernel[(_blocks(hidden_size, tiles.columns), parts, _blocks(num_tokens, block))](
            hidden,
            down_rows,
            indices,
            indices if count is None else count,
            partial,
            num_tokens,
            max_kept,
            hidden_size,
            counted=count is not None,
            **_sizes(tiles, block),
        )
        sum_parts_kernel[(_blocks(out.numel(), _SUM_BLOCK),)](
            partial, out, out.numel(), num_parts=parts, block_outputs=_SUM_BLOCK
        )
        return out

    num_rows = max_kept if count is None else down_rows.shape[0]
    shape = (token_block(num_tokens), num_rows, hidden_size, count is not None, hidden.dtype)
    return _TUNER.run("down", shape, lambda: down_candidates(num_tokens, hidden.dtype, hidden.device), launch)


def _run_rows(kernel: str, inputs: torch.Tensor, num_rows: int, launch: Any) -> torch.Tensor:
    num_tokens, hidden_size = inputs.shape
    shape = (token_block(num_tokens), num_rows, hidden_size, inputs.dtype)
    return _TUNER.run(kernel, shape, lambda: row_candidates(num_tokens, inputs.dtype, inputs.device), launch)


def _sizes(tiles: Tiles, block: int) -> dict[str, Any]:
    return {
        "block_tokens": block,
        "block_rows": tiles.rows,
        "block_columns": tiles.columns,
        "tensor_cores": tiles.tensor_cores,
        "stages": tiles.stages,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _block(tiles: Tiles, num_tokens: int) -> int:
    return max(token_block(num_tokens), 16) if tiles.tensor_cores else 1


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
