"""Correctness of the benchmark on CPU: a tiny decoder in Triton's interpreter against plain PyTorch."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.gpu import glue, measure, report
from benchmarks.gpu.decoder import Decoder, Layer, coarse, dense_ffn, fine
from benchmarks.gpu.measure import DRAFTS, draft_ffn, ffn_parameters, num_kept, step_bytes
from benchmarks.gpu.shapes import PAPER_RESULTS, TINY

LENGTH = 72


def run_checks() -> None:
    """Runs all checks.

    Raises:
        AssertionError: If something is computed wrongly.
    """
    torch.manual_seed(0)
    for check in (check_dense_step, check_verification, check_drafts, check_bytes, check_tables):
        check()
        print(f"{check.__name__.replace('_', ' ')}: ok")


def check_dense_step() -> None:
    """A dense step equals a decoder in plain PyTorch."""
    decoder = _tiny()
    tokens, positions = _last_tokens(5)
    actual = decoder.step(tokens, positions, dense_ffn)
    assert_close(actual, _plain_step(_copy_of(decoder), tokens, positions))
    assert torch.equal(glue.argmax(actual), actual.argmax(dim=-1))


def check_verification() -> None:
    """Verifying tokens gives what decoding them one after the other gives, logits and cache."""
    decoder = _tiny()
    single = _copy_of(decoder)
    tokens, positions = _last_tokens(5)
    together = decoder.step(tokens, positions, dense_ffn)
    for row in range(len(tokens)):
        place = positions[row : row + 1]
        assert_close(single.step(tokens[row : row + 1], place, dense_ffn), together[row : row + 1])
    for one, other in zip(decoder.layers, single.layers, strict=True):
        assert_close(one.keys, other.keys)
        assert_close(one.values, other.values)


def check_drafts() -> None:
    """A draft that keeps all neurons is the dense step; one that keeps some equals a masked dense FFN."""
    decoder = _tiny()
    tokens, positions = _last_tokens(1)
    dense = decoder.step(tokens, positions, dense_ffn)
    for ffn in (coarse(decoder.layers, TINY.num_neurons), fine(TINY.num_neurons)):
        assert_close(decoder.step(tokens, positions, ffn), dense)
    for kind, density in DRAFTS:
        draft = decoder.step(tokens, positions, draft_ffn(decoder, kind, density))
        kept = num_kept(decoder, density)

        def masked(index: int, layer: Layer, inputs: torch.Tensor, kind: str = kind, kept: int = kept) -> torch.Tensor:
            gate, up = F.linear(inputs, layer.gate_up).chunk(2, dim=-1)
            chosen = layer.order[:kept].long()[None] if kind == "coarse" else F.silu(gate).abs().topk(kept).indices
            mask = torch.zeros_like(gate).scatter_(1, chosen, 1.0)
            return (F.silu(gate) * up * mask) @ layer.down_rows

        assert_close(draft, decoder.step(tokens, positions, masked))
        assert not torch.allclose(draft, dense, rtol=1e-2, atol=1e-2)


def check_bytes() -> None:
    """The bytes that tables divide by are those of the tensors, and nothing is stored twice."""
    decoder = _tiny()
    size = decoder.dtype.itemsize
    layer = decoder.layers[0]
    tensors = (layer.qkv, layer.output, layer.gate_up, layer.down_rows, layer.keys, layer.values)
    one = sum(tensor.numel() for tensor in tensors)
    assert step_bytes(decoder, TINY.ffn_parameters) == size * (TINY.num_layers * one + decoder.head.numel())
    assert ffn_parameters(decoder, "coarse", 1.0) == ffn_parameters(decoder, "fine", 1.0) == TINY.ffn_parameters
    assert layer.gate_up.numel() + layer.down_rows.numel() == TINY.ffn_parameters


def check_tables() -> None:
    """The path from model to tables holds together, with seconds made up from bytes."""
    decoder, empty = _tiny(), Decoder(TINY, 0, LENGTH, torch.device("cpu"), torch.float32)
    verified = [paper.kernel_size for paper in PAPER_RESULTS]
    with (
        mock.patch.object(measure, "capture", lambda function: function),
        mock.patch.object(measure, "_seconds", _seconds_by_bytes),
        mock.patch.object(measure, "SAMPLES", 2),
    ):
        measure.warm_up_drafts(decoder)
        steps, bare = (measure.time_steps(model, verified) for model in (decoder, empty))
        ffns = measure.time_ffns(decoder, 3, max_layers=1)
    whole = replace(TINY, num_layers=2 * TINY.num_layers)
    rows = report.step_rows(steps, bare, whole, TINY.num_layers, bandwidth=1e9)
    # Seconds follow bytes here, so every step costs its share of them and runs at the bandwidth.
    for row in rows:
        assert abs(row["cost_over_byte_share"] - 1) < 1e-6, row
        assert abs(row["part_of_copy_bandwidth"] - 1) < 1e-6, row
    speedups = report.speedup_rows(rows)
    assert len(speedups) == len(PAPER_RESULTS) * len(DRAFTS)
    result = {"model": TINY.name, "layers": TINY.num_layers, "all_layers": whole.num_layers, "length": LENGTH}
    tables = {"steps": rows, "speedups": speedups, "ffns": report.ffn_rows(ffns, 1, 3, bandwidth=1e9)}
    with redirect_stdout(io.StringIO()) as printed:
        report.print_model({**result, **tables})
    assert len(printed.getvalue().splitlines()) == 7 + len(rows) + len(speedups) + len(ffns)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares fp32 results that were summed in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def _seconds_by_bytes(arm: measure.Arm, count: int) -> float:
    arm.replay()
    return 1e-9 * arm.num_bytes


def _tiny() -> Decoder:
    return Decoder(TINY, TINY.num_layers, LENGTH, torch.device("cpu"), torch.float32)


def _copy_of(decoder: Decoder) -> Decoder:
    copy = _tiny()
    copy.head = decoder.head
    copy.layers = [
        Layer(**{**vars(layer), "keys": layer.keys.clone(), "values": layer.values.clone()}) for layer in decoder.layers
    ]
    return copy


def _last_tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, TINY.vocab_size, (count,)), torch.arange(LENGTH - count, LENGTH)


def _plain_step(decoder: Decoder, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    shape = decoder.shape
    half, num_kv = shape.head_size // 2, shape.num_kv_heads
    angle = positions[:, None, None] / glue.ROPE_THETA ** (torch.arange(half) / half)
    cosine, sine = angle.cos(), angle.sin()

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        left, right = heads.split(half, dim=-1)
        return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)

    def normed(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (shape.hidden_size,), weight, glue.EPSILON)

    hidden = decoder.head[tokens]
    for layer in decoder.layers:
        heads = F.linear(normed(hidden, layer.attention_norm), layer.qkv).view(len(tokens), -1, shape.head_size)
        queries, keys, values = heads.split([shape.num_heads, num_kv, num_kv], dim=1)
        layer.keys[:, positions] = rotated(keys).transpose(0, 1)
        layer.values[:, positions] = values.transpose(0, 1)
        attended = []
        for head, query in enumerate(rotated(queries).unbind(dim=1)):
            group = head // (shape.num_heads // num_kv)
            scores = query @ layer.keys[group].T / shape.head_size**0.5
            scores = scores.masked_fill(torch.arange(LENGTH) > positions[:, None], float("-inf"))
            attended.append(scores.softmax(dim=-1) @ layer.values[group])
        hidden = hidden + F.linear(torch.cat(attended, dim=-1), layer.output)
        gate, up = F.linear(normed(hidden, layer.ffn_norm), layer.gate_up).chunk(2, dim=-1)
        hidden = hidden + (F.silu(gate) * up) @ layer.down_rows
    return F.linear(normed(hidden, decoder.final_norm), decoder.head)
