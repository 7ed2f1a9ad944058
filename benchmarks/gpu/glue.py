"""The small operations between the matrix products, as Triton kernels, so that they cost what they cost in an engine.

Done by plain PyTorch they would be twenty launches a layer and would hide the difference between dense and draft.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels.triton.projection import multiply, narrow
from vllm_sirius.kernels.triton.runtime import jit, tl

EPSILON = 1e-5
ROPE_THETA = 500000.0
KEYS_PER_BLOCK = 64
MAX_PARTS = 16
"""Parts into which the cache is split, a power of two."""
ARGMAX_BLOCK = 1024


def add_rms_norm(residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Adds to the residual stream, in place, and normalises the sum.

    Args:
        residual: ``[tokens, hidden]``.
        delta: What to add, same shape, or ``None``.
        weight: ``[hidden]``.

    Returns:
        ``[tokens, hidden]``.
    """
    output = torch.empty_like(residual)
    tokens, width = residual.shape
    block = 1 << (width - 1).bit_length()
    _add_rms_norm_kernel[(tokens,)](
        residual,
        residual if delta is None else delta,
        weight,
        output,
        width,
        EPSILON,
        has_delta=delta is not None,
        block=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return output


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate_up: ``[tokens, 2 * neurons]``, the gate first.

    Returns:
        ``[tokens, neurons]``.
    """
    tokens, neurons = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(tokens, neurons)
    _silu_and_mul_kernel[(tokens, -(-neurons // 1024))](gate_up, output, neurons, block=1024)
    return output


def rotate_and_store(
    qkv: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Rotates queries and keys by their positions and stores keys and values in the cache.

    Args:
        qkv: ``[tokens, (heads + 2 * kv_heads) * head_size]``.
        positions: ``int64 [tokens]``.
        keys: Cache, ``[kv_heads, length, head_size]``.
        values: Cache, same shape.
        num_heads: Query heads.

    Returns:
        Queries, ``[kv_heads, heads per kv_head, tokens, head_size]``.
    """
    tokens = qkv.shape[0]
    num_kv_heads, length, head_size = keys.shape
    queries = qkv.new_empty(num_kv_heads, num_heads // num_kv_heads, tokens, head_size)
    _rotate_and_store_kernel[(tokens, num_heads + 2 * num_kv_heads)](
        qkv,
        positions,
        queries,
        keys,
        values,
        tokens,
        length,
        num_heads,
        num_kv_heads,
        ROPE_THETA,
        half=head_size // 2,
        num_warps=1,
    )
    return queries


def attend(queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of the tokens that end a sequence, the cache split among programs as engines do.

    Args:
        queries: ``[kv_heads, heads per kv_head, tokens, head_size]``.
        positions: ``int64 [tokens]``; a token sees the cache up to its position.
        keys: Cache, ``[kv_heads, length, head_size]``.
        values: Cache, same shape.

    Returns:
        ``[tokens, heads * head_size]``.
    """
    num_kv_heads, group, tokens, head_size = queries.shape
    length, rows = keys.shape[1], group * tokens
    split = max(KEYS_PER_BLOCK, -(-length // (MAX_PARTS * KEYS_PER_BLOCK)) * KEYS_PER_BLOCK)
    parts, block_rows = -(-length // split), 16 if rows <= 16 else 64
    partial = torch.empty(num_kv_heads, rows, parts, head_size, dtype=torch.float32, device=keys.device)
    tops, norms = (partial.new_empty(num_kv_heads, rows, parts) for _ in range(2))
    sizes = {"head_size": head_size, "block_rows": block_rows, "block_keys": KEYS_PER_BLOCK}
    _attend_kernel[(num_kv_heads, -(-rows // block_rows), parts)](
        queries, keys, values, positions, partial, tops, norms, rows, tokens, length, split, head_size**-0.5, **sizes
    )
    output = queries.new_empty(tokens, num_kv_heads * group * head_size)
    _merge_parts_kernel[(num_kv_heads, rows)](
        partial, tops, norms, output, tokens, parts, head_size=head_size, block_parts=MAX_PARTS
    )
    return output


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest logit of each token; PyTorch's own gives a single token a single multiprocessor.

    Args:
        logits: ``[tokens, vocabulary]``.

    Returns:
        ``int64 [tokens]``.
    """
    tokens, vocabulary = logits.shape
    blocks = -(-vocabulary // ARGMAX_BLOCK)
    best = torch.empty(tokens, blocks, dtype=torch.float32, device=logits.device)
    place = torch.empty(tokens, blocks, dtype=torch.int64, device=logits.device)
    _argmax_kernel[(tokens, blocks)](logits, best, place, vocabulary, blocks, block=ARGMAX_BLOCK)
    return place.gather(1, best.argmax(dim=1, keepdim=True)).squeeze(1)


@jit
def _add_rms_norm_kernel(
    residual: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    output: tl.tensor,
    width: tl.tensor,
    epsilon: tl.tensor,
    has_delta: tl.constexpr,
    block: tl.constexpr,
) -> None:
    column = tl.arange(0, block)
    inside = column < width
    offset = tl.program_id(0) * width + column
    total = tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    if has_delta:
        total += tl.load(delta + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + offset, narrow(total, residual.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / width + epsilon)
    values = total * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + offset, narrow(values, output.dtype.element_ty), mask=inside)


@jit
def _silu_and_mul_kernel(gate_up: tl.tensor, output: tl.tensor, neurons: tl.tensor, block: tl.constexpr) -> None:
    token = tl.program_id(0)
    neuron = tl.program_id(1) * block + tl.arange(0, block)
    inside = neuron < neurons
    gate = tl.load(gate_up + token * 2 * neurons + neuron, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * neurons + neuron, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        output + token * neurons + neuron, narrow(gate * tl.sigmoid(gate) * up, output.dtype.element_ty), mask=inside
    )


@jit
def _rotate_and_store_kernel(
    qkv: tl.tensor,
    positions: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    length: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    theta: tl.tensor,
    half: tl.constexpr,
) -> None:
    token, head = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, half)
    position = tl.load(positions + token)
    start = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * 2 * half + lane
    left, right = tl.load(start).to(tl.float32), tl.load(start + half).to(tl.float32)
    if head < num_heads + num_kv_heads:
        angle = position.to(tl.float32) * tl.exp2(-tl.log2(theta) * lane.to(tl.float32) / half)
        cosine, sine = tl.cos(angle), tl.sin(angle)
        left, right = left * cosine - right * sine, right * cosine + left * sine
    if head < num_heads:
        target = queries + (head * tokens + token) * 2 * half + lane
        tl.store(target, narrow(left, queries.dtype.element_ty))
        tl.store(target + half, narrow(right, queries.dtype.element_ty))
    elif head < num_heads + num_kv_heads:
        target = keys + ((head - num_heads) * length + position) * 2 * half + lane
        tl.store(target, narrow(left, keys.dtype.element_ty))
        tl.store(target + half, narrow(right, keys.dtype.element_ty))
    else:
        target = values + ((head - num_heads - num_kv_heads) * length + position) * 2 * half + lane
        tl.store(target, narrow(left, values.dtype.element_ty))
        tl.store(target + half, narrow(right, values.dtype.element_ty))


@jit
def _attend_kernel(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    positions: tl.tensor,
    partial: tl.tensor,
    tops: tl.tensor,
    norms: tl.tensor,
    num_rows: tl.tensor,
    num_tokens: tl.tensor,
    length: tl.tensor,
    split: tl.tensor,
    scale: tl.tensor,
    head_size: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
) -> None:
    head, part, num_parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, head_size)
    row_mask = row < num_rows
    row_start = head * num_rows + row
    query = tl.load(queries + row_start[:, None] * head_size + column[None, :], mask=row_mask[:, None], other=0.0)
    position = tl.load(positions + row % num_tokens, mask=row_mask, other=-1)
    top = tl.full([block_rows], float("-inf"), dtype=tl.float32)
    norm = tl.zeros([block_rows], dtype=tl.float32)
    total = tl.zeros([block_rows, head_size], dtype=tl.float32)
    for first in tl.range(part * split, tl.minimum((part + 1) * split, length), block_keys):
        key = first + tl.arange(0, block_keys)
        key_start = (head * length + key)[:, None] * head_size + column[None, :]
        tile = tl.load(keys + key_start, mask=(key < length)[:, None], other=0.0)
        scores = multiply(query, tl.trans(tile), tl.zeros([block_rows, block_keys], dtype=tl.float32)) * scale
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        # A row may see nothing of this part.
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp(scores - reference[:, None])
        fade = tl.exp(top - reference)
        tile = tl.load(values + key_start, mask=(key < length)[:, None], other=0.0)
        total = multiply(narrow(weights, tile.dtype), tile, total * fade[:, None])
        norm = norm * fade + tl.sum(weights, axis=1)
        top = highest
    place = row_start * num_parts + part
    tl.store(partial + place[:, None] * head_size + column[None, :], total, mask=row_mask[:, None])
    tl.store(tops + place, top, mask=row_mask)
    tl.store(norms + place, norm, mask=row_mask)


@jit
def _merge_parts_kernel(
    partial: tl.tensor,
    tops: tl.tensor,
    norms: tl.tensor,
    output: tl.tensor,
    num_tokens: tl.tensor,
    num_parts: tl.tensor,
    head_size: tl.constexpr,
    block_parts: tl.constexpr,
) -> None:
    head, row, num_rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    part, column = tl.arange(0, block_parts), tl.arange(0, head_size)
    inside = part < num_parts
    place = (head * num_rows + row) * num_parts + part
    top = tl.load(tops + place, mask=inside, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, axis=0))
    norm = tl.sum(weight * tl.load(norms + place, mask=inside, other=0.0), axis=0)
    values = tl.load(partial + place[:, None] * head_size + column[None, :], mask=inside[:, None], other=0.0)
    total = tl.sum(values * weight[:, None], axis=0) / norm
    group = num_rows // num_tokens
    token, query_head = row % num_tokens, head * group + row // num_tokens
    target = output + (token * tl.num_programs(0) * group + query_head) * head_size + column
    tl.store(target, narrow(total, output.dtype.element_ty))


@jit
def _argmax_kernel(
    logits: tl.tensor, best: tl.tensor, place: tl.tensor, vocabulary: tl.tensor, blocks: tl.tensor, block: tl.constexpr
) -> None:
    token = tl.program_id(0)
    index = tl.program_id(1) * block + tl.arange(0, block)
    value = tl.load(logits + token * vocabulary + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
    highest, lane = tl.max(value, axis=0, return_indices=True)
    tl.store(best + token * blocks + tl.program_id(1), highest)
    tl.store(place + token * blocks + tl.program_id(1), (tl.program_id(1) * block + lane).to(tl.int64))
