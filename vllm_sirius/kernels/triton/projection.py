"""Triton kernels of the matrix products: rows of gate and up by neuron, then down.

Every kernel streams each weight it needs once per tile of tokens. One token runs as element-wise products that are
summed at the end; more run on tensor cores, padded to 16 or 32 tokens, which costs nothing while memory is the limit.
All sums are fp32. ``ieee`` precision concerns fp32 weights only.

Sizes that all kernels share:

* block_tokens: tokens of a tile; 1 without tensor cores;
* block_rows, block_columns: the tile of a weight that is read at a time;
* tensor_cores: whether tiles are multiplied on tensor cores;
* stages: depth of the pipeline of loads, 1 for none.
"""

from __future__ import annotations

from vllm_sirius.kernels.triton.runtime import INTERPRETED, jit, tl


@jit
def activate(gate: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """Applies the activation of the gate to fp32 values."""
    if activation == "silu":
        return gate * tl.sigmoid(gate)
    elif activation == "gelu_tanh":
        # 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))


@jit
def narrow(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Rounds fp32 values to the nearest of another dtype; Triton's interpreter cuts off for bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@jit
def multiply(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Adds a matrix product to an fp32 total; Triton's interpreter cannot multiply bf16."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@jit
def dot_rows(
    inputs: tl.tensor,
    weight: tl.tensor,
    first_token: tl.tensor,
    num_tokens: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    hidden_size: tl.tensor,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    tensor_cores: tl.constexpr,
    stages: tl.constexpr,
) -> tl.tensor:
    """Dot products of a tile of tokens with rows of a weight, fp32 ``[block_tokens, block_rows]``.

    `inputs` is ``[tokens, hidden]``, `weight` ``[any, hidden]``; `rows` and `row_mask` are ``[block_rows]``, and rows outside
    of the mask are not read and count as zero.
    """
    column = tl.arange(0, block_columns)
    row_start = weight + rows.to(tl.int64)[:, None] * hidden_size
    if tensor_cores:
        token = first_token + tl.arange(0, block_tokens)
        token_mask = token < num_tokens
        token_start = inputs + token.to(tl.int64)[:, None] * hidden_size
        total = tl.zeros([block_tokens, block_rows], dtype=tl.float32)
        for start in tl.range(0, hidden_size, block_columns, num_stages=stages):
            offset = start + column[None, :]
            inside = offset < hidden_size
            values = tl.load(token_start + offset, mask=token_mask[:, None] & inside, other=0.0)
            tile = tl.load(
                row_start + offset, mask=row_mask[:, None] & inside, other=0.0, eviction_policy="evict_first"
            )
            total = multiply(values, tl.trans(tile), total)
        return total
    else:
        token_start = inputs + first_token.to(tl.int64) * hidden_size
        products = tl.zeros([block_rows, block_columns], dtype=tl.float32)
        for start in tl.range(0, hidden_size, block_columns, num_stages=stages):
            offset = start + column[None, :]
            inside = offset < hidden_size
            values = tl.load(token_start + offset, mask=inside, other=0.0)
            tile = tl.load(
                row_start + offset, mask=row_mask[:, None] & inside, other=0.0, eviction_policy="evict_first"
            )
            products += tile.to(tl.float32) * values.to(tl.float32)
        return tl.sum(products, axis=1)[None, :]


@jit(do_not_specialize=["num_tokens"])
def gate_up_kernel(
    inputs: tl.tensor,
    gate_up: tl.tensor,
    indices: tl.tensor,
    hidden: tl.tensor,
    num_tokens: tl.tensor,
    num_kept: tl.tensor,
    num_neurons: tl.tensor,
    hidden_size: tl.tensor,
    activation: tl.constexpr,
    gate_first: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    tensor_cores: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Computes ``act(gate) * up`` of the kept neurons.

    Reads `inputs` ``[tokens, hidden]``, rows of `gate_up` ``[2 * neurons, hidden]`` and `indices` ``int32 [kept]``; writes
    `hidden` ``[tokens, kept]``. Programs: (blocks of `block_rows` / 2 neurons, tiles of tokens). Gate and up row of a neuron
    are neighbours in the tile.
    """
    block_neurons: tl.constexpr = block_rows // 2
    row = tl.arange(0, block_rows)
    position = tl.program_id(0) * block_neurons + row // 2
    row_mask = position < num_kept
    neuron = tl.load(indices + position, mask=row_mask, other=0)
    half = row % 2 if gate_first else 1 - row % 2
    first_token = tl.program_id(1) * block_tokens
    total = dot_rows(
        inputs,
        gate_up,
        first_token,
        num_tokens,
        neuron + half * num_neurons,
        row_mask,
        hidden_size,
        block_tokens,
        block_rows,
        block_columns,
        tensor_cores,
        stages,
    )
    gate, up = tl.split(tl.reshape(total, [block_tokens, block_neurons, 2]))
    token = first_token + tl.arange(0, block_tokens)
    kept = tl.program_id(0) * block_neurons + tl.arange(0, block_neurons)
    tl.store(
        hidden + token.to(tl.int64)[:, None] * num_kept + kept[None, :],
        narrow(activate(gate, activation) * up, hidden.dtype.element_ty),
        mask=(token < num_tokens)[:, None] & (kept < num_kept)[None, :],
    )


@jit(do_not_specialize=["num_tokens"])
def gate_kernel(
    inputs: tl.tensor,
    gate: tl.tensor,
    activated: tl.tensor,
    num_tokens: tl.tensor,
    num_neurons: tl.tensor,
    hidden_size: tl.tensor,
    activation: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    tensor_cores: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Computes ``act(gate)`` of all neurons, unrounded.

    Reads `inputs` ``[tokens, hidden]`` and `gate`, the gate's half of the merged weight, ``[neurons, hidden]``; writes
    `activated`, fp32 ``[tokens, neurons]``. Programs: (blocks of `block_rows` neurons, tiles of tokens).
    """
    neuron = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    first_token = tl.program_id(1) * block_tokens
    total = dot_rows(
        inputs,
        gate,
        first_token,
        num_tokens,
        neuron,
        neuron < num_neurons,
        hidden_size,
        block_tokens,
        block_rows,
        block_columns,
        tensor_cores,
        stages,
    )
    token = first_token + tl.arange(0, block_tokens)
    tl.store(
        activated + token.to(tl.int64)[:, None] * num_neurons + neuron[None, :],
        activate(total, activation),
        mask=(token < num_tokens)[:, None] & (neuron < num_neurons)[None, :],
    )


@jit(do_not_specialize=["num_tokens"])
def up_kernel(
    inputs: tl.tensor,
    up: tl.tensor,
    activated: tl.tensor,
    indices: tl.tensor,
    count: tl.tensor,
    hidden: tl.tensor,
    num_tokens: tl.tensor,
    max_kept: tl.tensor,
    num_neurons: tl.tensor,
    hidden_size: tl.tensor,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    tensor_cores: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Multiplies ``act(gate)`` of the neurons that some token keeps with their ``up``.

    Reads `inputs` ``[tokens, hidden]``, rows of `up`, the up half of the merged weight, ``[neurons, hidden]``, `activated`
    fp32 ``[tokens, neurons]``, zero where a token drops a neuron, and `indices` ``int32 [max_kept]``, valid up to `count`
    ``int32 [1]``; writes `hidden` ``[tokens, max_kept]``. Programs: (blocks of `block_rows` of `max_kept` neurons, tiles of
    tokens); those beyond `count` end at once.
    """
    num_kept = tl.load(count)
    if tl.program_id(0) * block_rows < num_kept:
        position = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
        row_mask = position < num_kept
        neuron = tl.load(indices + position, mask=row_mask, other=0)
        first_token = tl.program_id(1) * block_tokens
        total = dot_rows(
            inputs,
            up,
            first_token,
            num_tokens,
            neuron,
            row_mask,
            hidden_size,
            block_tokens,
            block_rows,
            block_columns,
            tensor_cores,
            stages,
        )
        token = first_token + tl.arange(0, block_tokens)
        mask = (token < num_tokens)[:, None] & row_mask[None, :]
        token = token.to(tl.int64)[:, None]
        gate = tl.load(activated + token * num_neurons + neuron[None, :], mask=mask, other=0.0)
        values = narrow(gate * total, hidden.dtype.element_ty)
        tl.store(hidden + token * max_kept + position[None, :], values, mask=mask)


@jit
def _down_tile(
    down_rows: tl.tensor,
    indices: tl.tensor,
    position: tl.tensor,
    row_mask: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    hidden_size: tl.tensor,
) -> tl.tensor:
    """Columns of the down rows of some kept neurons; they are read once."""
    neuron = tl.load(indices + position, mask=row_mask, other=0).to(tl.int64)
    offset = neuron[:, None] * hidden_size + column[None, :]
    mask = row_mask[:, None] & inside[None, :]
    return tl.load(down_rows + offset, mask=mask, other=0.0, eviction_policy="evict_first")


@jit(do_not_specialize=["num_tokens"])
def down_kernel(
    hidden: tl.tensor,
    down_rows: tl.tensor,
    indices: tl.tensor,
    count: tl.tensor,
    partial: tl.tensor,
    num_tokens: tl.tensor,
    max_kept: tl.tensor,
    hidden_size: tl.tensor,
    counted: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    tensor_cores: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """Projects one part of the kept neurons down.

    Reads `hidden` ``[tokens, max_kept]``, rows of `down_rows` ``[neurons, hidden]`` and `indices` ``int32 [max_kept]``, of which
    the first `count` ``int32 [1]`` are valid, or all if not `counted`; writes `partial`, fp32 ``[parts, tokens, hidden]``.
    Programs: (blocks of `block_columns` outputs, parts of the neurons, tiles of tokens).
    """
    num_kept = tl.load(count) if counted else max_kept
    column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    inside = column < hidden_size
    part = tl.program_id(1)
    size = tl.cdiv(tl.cdiv(num_kept, tl.num_programs(1)), block_rows) * block_rows
    begin = part * size
    end = tl.minimum(begin + size, num_kept)
    lane = tl.arange(0, block_rows)
    first_token = tl.program_id(2) * block_tokens
    token = first_token + tl.arange(0, block_tokens)
    token_mask = token < num_tokens
    token_start = token.to(tl.int64)[:, None]
    if tensor_cores:
        total = tl.zeros([block_tokens, block_columns], dtype=tl.float32)
        for start in tl.range(begin, end, block_rows, num_stages=stages):
            position = start + lane
            row_mask = position < end
            tile = _down_tile(down_rows, indices, position, row_mask, column, inside, hidden_size)
            mask = token_mask[:, None] & row_mask[None, :]
            values = tl.load(hidden + token_start * max_kept + position[None, :], mask=mask, other=0.0)
            total = multiply(values, tile, total)
    else:
        products = tl.zeros([block_rows, block_columns], dtype=tl.float32)
        for start in tl.range(begin, end, block_rows, num_stages=stages):
            position = start + lane
            row_mask = position < end
            tile = _down_tile(down_rows, indices, position, row_mask, column, inside, hidden_size)
            values = tl.load(hidden + first_token.to(tl.int64) * max_kept + position, mask=row_mask, other=0.0)
            products += tile.to(tl.float32) * values.to(tl.float32)[:, None]
        total = tl.sum(products, axis=0)[None, :]
    tl.store(
        partial + (part.to(tl.int64) * num_tokens + token_start) * hidden_size + column[None, :],
        total,
        mask=token_mask[:, None] & inside[None, :],
    )


@jit(do_not_specialize=["num_outputs"])
def sum_parts_kernel(
    partial: tl.tensor,
    output: tl.tensor,
    num_outputs: tl.tensor,
    num_parts: tl.constexpr,
    block_outputs: tl.constexpr,
) -> None:
    """Adds the parts of the down projection, always in the same order.

    Reads `partial` fp32 ``[num_parts, outputs]``, writes `output` ``[outputs]``. Programs: (blocks of outputs).
    """
    offset = tl.program_id(0).to(tl.int64) * block_outputs + tl.arange(0, block_outputs)
    inside = offset < num_outputs
    total = tl.zeros([block_outputs], dtype=tl.float32)
    pointer = partial + offset
    for _ in tl.static_range(num_parts):
        total += tl.load(pointer, mask=inside, other=0.0)
        pointer += num_outputs
    tl.store(output + offset, narrow(total, output.dtype.element_ty), mask=inside)
