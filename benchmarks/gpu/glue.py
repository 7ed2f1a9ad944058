"""The small operations between the matrix products, as Triton kernels, so that they cost what they cost in an engine.

Done by plain PyTorch they would be twenty launches a layer and would hide the difference between dense and draft.
"""

from __future__ import annotations

import torch

from vllm_sirius.ffn.kernels.triton.projection import narrow
from vllm_sirius.triton_runtime import jit, tl

EPSILON = 1e-5
ROPE_THETA = 500000.0


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
