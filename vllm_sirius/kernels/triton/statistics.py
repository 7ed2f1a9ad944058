"""The statistics tap on CUDA: adds a forward pass's FFN activations to the neuron statistics.

It reads which token belongs to which request from tensors on the device, so one captured graph serves every batch. The
host is never asked and nothing is added by atomics: results are the same in every run. Its twin is in `reference`.
"""

from __future__ import annotations

import torch

from vllm_sirius.kernels.triton.projection import narrow
from vllm_sirius.kernels.triton.runtime import jit, require_triton, tl

_NORM_BLOCK = 2048
_NEURON_BLOCK = 64
_FEW_TOKENS = 16
_TOKEN_BLOCK = 64


def observe_ffn(
    activation: torch.Tensor,
    token_slot: torch.Tensor,
    token_weight: torch.Tensor,
    pending_row: torch.Tensor,
    energy: torch.Tensor,
    pending: torch.Tensor,
    offset: int,
) -> None:
    """Counts the activations of one layer, each as its share ``z**2 / ||z||**2`` of its token on this rank.

    Args:
        activation: ``act(gate) * up``, ``[tokens, neurons]``, fp32, bf16 or fp16; neurons of a token are neighbours.
        token_slot: ``int32 [tokens]``, row of `energy` to add the token to, or -1 for none. Fastest where tokens of a slot
            are neighbours; right in any order.
        token_weight: ``float32 [tokens]``, factor of the token in `energy`.
        pending_row: ``int32 [tokens]``, row of `pending` to set to the token's shares, or -1 for none. No row twice.
        energy: ``float32 [slots, neurons of all layers]``.
        pending: ``bfloat16 [rows, neurons of all layers]``.
        offset: First neuron of this layer in both tables.

    Raises:
        ValueError: If a shape, dtype or layout is not as above.
        TritonUnavailableError: If Triton cannot run here.
    """
    _check(activation, token_slot, token_weight, pending_row, energy, pending, offset)
    require_triton(activation)
    num_tokens, num_neurons = activation.shape
    if num_tokens == 0 or num_neurons == 0:
        return
    norms = torch.empty(num_tokens, dtype=torch.float32, device=activation.device)
    square_norm_kernel[(num_tokens,)](
        activation,
        token_slot,
        pending_row,
        norms,
        num_neurons,
        activation.stride(0),
        block_neurons=_NORM_BLOCK,
    )
    add_shares_kernel[(-(-num_neurons // _NEURON_BLOCK),)](
        activation,
        norms,
        token_slot,
        token_weight,
        pending_row,
        energy,
        pending,
        num_tokens,
        num_neurons,
        activation.stride(0),
        energy.stride(0),
        pending.stride(0),
        offset,
        block_tokens=_FEW_TOKENS if num_tokens <= _FEW_TOKENS else _TOKEN_BLOCK,
        block_neurons=_NEURON_BLOCK,
    )


@jit
def square_norm_kernel(
    activation: tl.tensor,
    token_slot: tl.tensor,
    pending_row: tl.tensor,
    norms: tl.tensor,
    num_neurons: tl.tensor,
    token_stride: tl.tensor,
    block_neurons: tl.constexpr,
) -> None:
    """Writes ``||z||**2`` of each token that counts, fp32 ``[tokens]``. Programs: (tokens)."""
    token = tl.program_id(0)
    if tl.maximum(tl.load(token_slot + token), tl.load(pending_row + token)) >= 0:
        start = activation + token.to(tl.int64) * token_stride
        squares = tl.zeros([block_neurons], dtype=tl.float32)
        for first in tl.range(0, num_neurons, block_neurons):
            neuron = first + tl.arange(0, block_neurons)
            value = tl.load(start + neuron, mask=neuron < num_neurons, other=0.0).to(tl.float32)
            squares += value * value
        # The smallest normal number: a token without any activation gets shares of zero.
        tl.store(norms + token, tl.maximum(tl.sum(squares, axis=0), 1.1754943508222875e-38))


@jit(do_not_specialize=["num_tokens"])
def add_shares_kernel(
    activation: tl.tensor,
    norms: tl.tensor,
    token_slot: tl.tensor,
    token_weight: tl.tensor,
    pending_row: tl.tensor,
    energy: tl.tensor,
    pending: tl.tensor,
    num_tokens: tl.tensor,
    num_neurons: tl.tensor,
    token_stride: tl.tensor,
    energy_stride: tl.tensor,
    pending_stride: tl.tensor,
    offset: tl.tensor,
    block_tokens: tl.constexpr,
    block_neurons: tl.constexpr,
) -> None:
    """Adds the shares of all tokens to one block of neurons. Programs: (blocks of neurons).

    A program owns its neurons in every slot. It walks the tokens in tiles and holds the sum of one slot, which it adds to
    the table when another slot follows.
    """
    neuron = tl.program_id(0) * block_neurons + tl.arange(0, block_neurons)
    inside = neuron < num_neurons
    lane = tl.arange(0, block_tokens)
    held = tl.full([], -1, dtype=tl.int32)
    total = tl.zeros([block_neurons], dtype=tl.float32)
    for first in tl.range(0, num_tokens, block_tokens):
        token = first + lane
        slot = tl.load(token_slot + token, mask=token < num_tokens, other=-1)
        row = tl.load(pending_row + token, mask=token < num_tokens, other=-1)
        counts = tl.maximum(slot, row)
        if tl.max(counts, axis=0) >= 0:
            norm = tl.load(norms + token, mask=counts >= 0, other=1.0)
            value = tl.load(
                activation + token.to(tl.int64)[:, None] * token_stride + neuron[None, :],
                mask=(counts >= 0)[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            share = value * value / norm[:, None]
            tl.store(
                pending + row.to(tl.int64)[:, None] * pending_stride + (offset + neuron)[None, :],
                narrow(share, pending.dtype.element_ty),
                mask=(row >= 0)[:, None] & inside[None, :],
            )
            share *= tl.load(token_weight + token, mask=slot >= 0, other=0.0)[:, None]
            current = tl.max(slot, axis=0)
            while current >= 0:
                if current != held:
                    add_to_slot(energy, held, energy_stride, offset + neuron, total, inside)
                    total = tl.zeros([block_neurons], dtype=tl.float32)
                    held = current
                total += tl.sum(tl.where((slot == current)[:, None], share, 0.0), axis=0)
                slot = tl.where(slot == current, -1, slot)
                current = tl.max(slot, axis=0)
    add_to_slot(energy, held, energy_stride, offset + neuron, total, inside)


@jit
def add_to_slot(
    energy: tl.tensor,
    slot: tl.tensor,
    energy_stride: tl.tensor,
    column: tl.tensor,
    total: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Adds a sum to the row of a slot; does nothing for slot -1."""
    if slot >= 0:
        pointer = energy + slot.to(tl.int64) * energy_stride + column
        tl.store(pointer, tl.load(pointer, mask=inside, other=0.0) + total, mask=inside)
        # The same slot may come again, and other threads of the program may then read these sums.
        tl.debug_barrier()


def _check(
    activation: torch.Tensor,
    token_slot: torch.Tensor,
    token_weight: torch.Tensor,
    pending_row: torch.Tensor,
    energy: torch.Tensor,
    pending: torch.Tensor,
    offset: int,
) -> None:
    if activation.dim() != 2 or activation.stride(1) != 1:
        raise ValueError("activation must be [tokens, neurons] with the neurons of a token next to each other")
    num_tokens, num_neurons = activation.shape
    for name, tensor, dtype in (
        ("token_slot", token_slot, torch.int32),
        ("token_weight", token_weight, torch.float32),
        ("pending_row", pending_row, torch.int32),
    ):
        if tensor.dtype != dtype or tensor.shape != (num_tokens,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} [{num_tokens}], not {tensor.dtype} {list(tensor.shape)}"
            )
    for name, table, dtype in (("energy", energy, torch.float32), ("pending", pending, torch.bfloat16)):
        if table.dtype != dtype or table.dim() != 2 or table.stride(1) != 1 or table.shape[1] < offset + num_neurons:
            raise ValueError(f"{name} must be {dtype} [rows, at least {offset + num_neurons}]")
