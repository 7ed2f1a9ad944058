"""Triton kernels for a single token: a neuron's gate, up and down row are read in one go.

One token leaves the multiprocessors nothing to do but to read, and what stops them from reading is waiting: for the end of
a launch, for the slowest program, for an index. So there is one launch instead of two. Its programs stay for the whole
FFN, take every n-th group of neurons, and ask for the down rows of a group together with its gate and up rows, before
anybody knows by which value they will be multiplied. Each program keeps the sum of its own neurons, fp32, for the whole
width; a second launch adds the programs up, always in the same order.
"""

from __future__ import annotations

from vllm_sirius.kernels.triton.projection import activate, narrow
from vllm_sirius.kernels.triton.runtime import jit, tl


@jit
def kept_rows(
    indices: tl.tensor,
    position: tl.tensor,
    num_kept: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    hidden_size: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Where the rows of some kept neurons lie: the neurons and which of them exist, offsets of their weights and a mask."""
    row_mask = position < num_kept
    neuron = tl.load(indices + position, mask=row_mask, other=0).to(tl.int64)
    return neuron, row_mask, neuron[:, None] * hidden_size + column[None, :], row_mask[:, None] & inside[None, :]


@jit
def stream_coarse_kernel(
    inputs: tl.tensor,
    gate_up: tl.tensor,
    down_rows: tl.tensor,
    indices: tl.tensor,
    partial: tl.tensor,
    num_kept: tl.tensor,
    num_neurons: tl.tensor,
    hidden_size: tl.tensor,
    activation: tl.constexpr,
    gate_first: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Runs the kept neurons of one token.

    Reads `inputs` ``[hidden]``, rows of `gate_up` ``[2 * neurons, hidden]`` and of `down_rows` ``[neurons, hidden]``, and
    `indices` ``int32 [kept]``; writes `partial`, fp32 ``[programs, hidden]``. `block_columns` covers the whole width.
    """
    column = tl.arange(0, block_columns)
    inside = column < hidden_size
    lane = tl.arange(0, block_rows)
    token = tl.load(inputs + column, mask=inside, other=0.0).to(tl.float32)
    gate_start = gate_up
    up_start = gate_up + tl.cast(num_neurons, tl.int64) * hidden_size
    if not gate_first:
        gate_start, up_start = up_start, gate_start
    total = tl.zeros([block_columns], dtype=tl.float32)
    num_blocks = tl.cdiv(num_kept, block_rows)
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=stages):
        _, _, offset, mask = kept_rows(indices, block * block_rows + lane, num_kept, column, inside, hidden_size)
        gate_tile = tl.load(gate_start + offset, mask=mask, other=0.0, eviction_policy="evict_first")
        up_tile = tl.load(up_start + offset, mask=mask, other=0.0, eviction_policy="evict_first")
        down_tile = tl.load(down_rows + offset, mask=mask, other=0.0, eviction_policy="evict_first")
        gate = tl.sum(gate_tile.to(tl.float32) * token[None, :], axis=1)
        up = tl.sum(up_tile.to(tl.float32) * token[None, :], axis=1)
        hidden = narrow(activate(gate, activation) * up, inputs.dtype.element_ty).to(tl.float32)
        total += tl.sum(down_tile.to(tl.float32) * hidden[:, None], axis=0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * hidden_size + column, total, mask=inside)


@jit
def stream_fine_kernel(
    inputs: tl.tensor,
    up: tl.tensor,
    down_rows: tl.tensor,
    activated: tl.tensor,
    indices: tl.tensor,
    partial: tl.tensor,
    num_kept: tl.tensor,
    hidden_size: tl.tensor,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Runs the neurons that one token keeps, whose gates are known.

    As `stream_coarse_kernel`; `up` is the up half of the merged weight, ``[neurons, hidden]``, and `activated` holds
    ``act(gate)`` by neuron, fp32 ``[neurons]``.
    """
    column = tl.arange(0, block_columns)
    inside = column < hidden_size
    lane = tl.arange(0, block_rows)
    token = tl.load(inputs + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([block_columns], dtype=tl.float32)
    num_blocks = tl.cdiv(num_kept, block_rows)
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=stages):
        neuron, row_mask, offset, mask = kept_rows(
            indices, block * block_rows + lane, num_kept, column, inside, hidden_size
        )
        gate = tl.load(activated + neuron, mask=row_mask, other=0.0)
        up_tile = tl.load(up + offset, mask=mask, other=0.0, eviction_policy="evict_first")
        down_tile = tl.load(down_rows + offset, mask=mask, other=0.0, eviction_policy="evict_first")
        products = tl.sum(up_tile.to(tl.float32) * token[None, :], axis=1)
        hidden = narrow(gate * products, inputs.dtype.element_ty).to(tl.float32)
        total += tl.sum(down_tile.to(tl.float32) * hidden[:, None], axis=0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * hidden_size + column, total, mask=inside)


@jit
def sum_programs_kernel(
    partial: tl.tensor,
    output: tl.tensor,
    num_programs: tl.tensor,
    hidden_size: tl.tensor,
    block_programs: tl.constexpr,
    block_columns: tl.constexpr,
) -> None:
    """Adds up what the programs summed, always in the same order.

    Reads `partial` fp32 ``[programs, hidden]``, writes `output` ``[hidden]``. Programs: (blocks of columns).
    """
    column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    inside = column < hidden_size
    lane = tl.arange(0, block_programs)
    total = tl.zeros([block_programs, block_columns], dtype=tl.float32)
    for first in tl.range(0, num_programs, block_programs):
        program = first + lane
        mask = (program < num_programs)[:, None] & inside[None, :]
        total += tl.load(partial + program.to(tl.int64)[:, None] * hidden_size + column[None, :], mask=mask, other=0.0)
    tl.store(output + column, narrow(tl.sum(total, axis=0), output.dtype.element_ty), mask=inside)
