"""Triton kernels of fine selection: each token keeps its largest gates, the batch reads what some token keeps.

Nothing here needs the host: the number of neurons that some token keeps stays on the device.
"""

from __future__ import annotations

from vllm_sirius.kernels.triton.runtime import jit, tl


@jit
def write_kept(kept: tl.tensor, neuron: tl.tensor, indices: tl.tensor, count: tl.tensor) -> None:
    """Writes the neurons of a mask in ascending order, and how many they are."""
    kept = kept.to(tl.int32)
    position = tl.cumsum(kept, axis=0) - 1
    tl.store(indices + position, neuron, mask=kept > 0)
    tl.store(count, tl.sum(kept, axis=0))


@jit
def keep_largest_kernel(
    activated: tl.tensor,
    indices: tl.tensor,
    count: tl.tensor,
    num_kept: tl.tensor,
    num_neurons: tl.tensor,
    list_kept: tl.constexpr,
    block_neurons: tl.constexpr,
) -> None:
    """Sets all but the `num_kept` largest ``|act(gate)|`` of a token to zero; of equal ones the lower index stays.

    Reads and writes `activated` fp32 ``[tokens, neurons]``; if `list_kept`, also writes `indices` ``int32 [num_kept]`` and
    `count` ``int32 [1]``, which is for one token only. Programs: (tokens). `block_neurons` covers all neurons.

    The bits of a non-negative float order like the float, so the magnitude of the last neuron kept is found bit by bit:
    it is the largest number that at least `num_kept` magnitudes reach. What lies beyond the last neuron counts as zero and
    comes last, so it is never kept.
    """
    neuron = tl.arange(0, block_neurons)
    inside = neuron < num_neurons
    pointer = activated + tl.program_id(0).to(tl.int64) * num_neurons + neuron
    value = tl.load(pointer, mask=inside, other=0.0)
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    smallest = 0
    for place in tl.range(0, 31):
        candidate = smallest | (1 << (30 - place))
        reached = tl.sum((magnitude >= candidate).to(tl.int32), axis=0)
        smallest = tl.where(reached >= num_kept, candidate, smallest)
    larger = magnitude > smallest
    equal = magnitude == smallest
    num_equal = num_kept - tl.sum(larger.to(tl.int32), axis=0)
    kept = larger | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= num_equal))
    tl.store(pointer, 0.0, mask=inside & (kept == 0))
    if list_kept:
        write_kept(kept, neuron, indices, count)


@jit(do_not_specialize=["num_tokens"])
def list_kept_kernel(
    activated: tl.tensor,
    indices: tl.tensor,
    count: tl.tensor,
    num_tokens: tl.tensor,
    num_neurons: tl.tensor,
    block_neurons: tl.constexpr,
) -> None:
    """Lists the neurons that are not zero for every token.

    Reads `activated` fp32 ``[tokens, neurons]``; writes `indices` ``int32`` and `count` ``int32 [1]``. One program, whose
    `block_neurons` cover all neurons.
    """
    neuron = tl.arange(0, block_neurons)
    inside = neuron < num_neurons
    kept = tl.zeros([block_neurons], dtype=tl.int32)
    pointer = activated + neuron
    for _ in tl.range(0, num_tokens):
        kept |= (tl.load(pointer, mask=inside, other=0.0) != 0.0).to(tl.int32)
        pointer += num_neurons
    write_kept(kept, neuron, indices, count)
