"""Times decode steps with CUDA graphs on the GPU at hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from benchmarks.gpu.decoder import FFN, Decoder, Layer, coarse, dense_ffn, fine
from benchmarks.gpu.glue import argmax, silu_and_mul
from vllm_sirius.kernels.triton.kernels import warm_up

DRAFTS = (("coarse", 0.5), ("coarse", 0.3), ("fine", 0.5))
"""Kind of sparsity and part of the neurons kept."""

SAMPLES = 15
SAMPLE_SECONDS = 0.05
COPY_BYTES = 1 << 30


@dataclass
class Arm:
    """Something to time.

    Attributes:
        name: Shown in tables.
        num_bytes: Weights and cache that one call reads.
        replay: Runs it once.
        seconds: One sample per round.
    """

    name: str
    num_bytes: int
    replay: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as part of the median."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """Turns a function into a CUDA graph; returns what replays it and keeps the tensors that the graph reads alive."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(function: Callable[[], object] = function) -> None:
        graph.replay()

    return replay


def time_arms(arms: list[Arm]) -> None:
    """Takes samples of all arms in turn, so that a change of clocks hits all of them."""
    counts = []
    for arm in arms:
        _seconds(arm, 3)
        counts.append(max(1, int(SAMPLE_SECONDS / _seconds(arm, 3))))
    for _ in range(SAMPLES):
        for arm, count in zip(arms, counts, strict=True):
            arm.seconds.append(_seconds(arm, count))


def _seconds(arm: Arm, count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        arm.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy in the GPU's memory."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    arm = Arm("copy", 2 * COPY_BYTES, lambda: target.copy_(source))
    time_arms([arm])
    return arm.num_bytes / arm.median


def num_kept(decoder: Decoder, density: float) -> int:
    """Neurons that a density keeps of a layer."""
    return max(1, round(density * decoder.shape.num_neurons))


def draft_ffn(decoder: Decoder, kind: str, density: float) -> FFN:
    """How the FFNs of a draft run."""
    kept = num_kept(decoder, density)
    return coarse(decoder.layers, kept) if kind == "coarse" else fine(kept)


def ffn_parameters(decoder: Decoder, kind: str, density: float) -> int:
    """Weights that a reduced FFN reads for one token: fine selection reads every gate."""
    kept, width = num_kept(decoder, density), decoder.shape.hidden_size
    return 3 * kept * width if kind == "coarse" else (decoder.shape.num_neurons + 2 * kept) * width


def step_bytes(decoder: Decoder, ffn_parameters: int) -> int:
    """Bytes of weights and cache that one step reads."""
    shape = decoder.shape
    cache = 2 * shape.num_kv_heads * shape.head_size * decoder.length
    layer = shape.attention_parameters + ffn_parameters + cache
    return decoder.dtype.itemsize * (len(decoder.layers) * layer + shape.head_parameters)


def step_function(decoder: Decoder, num_tokens: int, ffn: FFN) -> Callable[[], torch.Tensor]:
    """A step over the last `num_tokens` tokens of a sequence that fills the cache; returns the next tokens."""
    positions = torch.arange(decoder.length - num_tokens, decoder.length, device=decoder.device)
    token_ids = torch.randint(0, decoder.shape.vocab_size, (num_tokens,), device=decoder.device)
    return lambda: argmax(decoder.step(token_ids, positions, ffn))


def warm_up_drafts(decoder: Decoder) -> None:
    """Chooses the fastest tiles of every draft."""
    layer = decoder.layers[0]
    for kind, density in DRAFTS:
        kept = num_kept(decoder, density)
        warm_up(layer.gate_up, layer.down_rows, kept, "silu", fine=kind == "fine", token_counts=(1, 16, 32))


def time_steps(decoder: Decoder, verified: list[int]) -> dict[str, Arm]:
    """Times the dense step, every draft step and verification.

    Args:
        decoder: The model.
        verified: Numbers of tokens to verify.

    Returns:
        ``dense``, ``coarse 0.5`` and the like, ``verify 16`` and the like.
    """
    full = decoder.shape.ffn_parameters
    arms = [Arm("dense", step_bytes(decoder, full), capture(step_function(decoder, 1, dense_ffn)))]
    for kind, density in DRAFTS:
        draft = step_function(decoder, 1, draft_ffn(decoder, kind, density))
        read = step_bytes(decoder, ffn_parameters(decoder, kind, density))
        arms.append(Arm(f"{kind} {density}", read, capture(draft)))
    for tokens in verified:
        verify = step_function(decoder, tokens, dense_ffn)
        arms.append(Arm(f"verify {tokens}", step_bytes(decoder, full), capture(verify)))
    time_arms(arms)
    return {arm.name: arm for arm in arms}


def time_ffns(decoder: Decoder, num_tokens: int, max_layers: int) -> list[Arm]:
    """Times FFNs alone, a few layers in a row, as many as no cache holds.

    ``dense, usual layout`` stores the down projection as ``[hidden, neurons]``, as vLLM does without Sirius: the dense FFN
    must not be slower on rows that it shares with the draft.

    Args:
        decoder: The model.
        num_tokens: Batch.
        max_layers: Layers to run.

    Returns:
        One arm per way to run them. Bytes of fine FFNs are those of a single token.
    """
    layers = decoder.layers[:max_layers]
    usual = [layer.down_rows.t().contiguous() for layer in layers]
    inputs = torch.randn(num_tokens, decoder.shape.hidden_size, device=decoder.device).to(decoder.dtype)

    def dense_usual_layout(index: int, layer: Layer, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(silu_and_mul(F.linear(inputs, layer.gate_up)), usual[index])

    def in_a_row(ffn: FFN) -> Callable[[], object]:
        return lambda: [ffn(index, layer, inputs) for index, layer in enumerate(layers)]

    ways: list[tuple[str, FFN, int]] = [
        ("dense", dense_ffn, decoder.shape.ffn_parameters),
        ("dense, usual layout", dense_usual_layout, decoder.shape.ffn_parameters),
    ]
    for kind, density in DRAFTS:
        read = ffn_parameters(decoder, kind, density)
        ways.append((f"{kind} {density}", draft_ffn(decoder, kind, density), read))
    arms = []
    for name, ffn, parameters in ways:
        arms.append(Arm(name, len(layers) * parameters * decoder.dtype.itemsize, capture(in_a_row(ffn))))
    time_arms(arms)
    return arms
