"""The Triton kernels compute what their twins compute. Run by `test_triton_kernels.py` in processes of their own.

Triton's interpreter is chosen when Triton is imported, so these tests cannot share a process with others. On any machine,
and compiled on a GPU:

    TRITON_INTERPRET=1 python -m pytest tests/unit/triton_twins.py
    python -m pytest tests/unit/triton_twins.py
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.triton import kernels, projection, reference, statistics, tuning
from vllm_sirius.kernels.triton.acceptance import pick_tokens, pick_tokens_reference
from vllm_sirius.kernels.triton.runtime import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
assert INTERPRETED or torch.cuda.is_available(), "no GPU: set TRITON_INTERPRET=1"

DTYPES = (torch.float32, torch.bfloat16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 64, 32), (1, 257, 129), (2, 33, 7), (3, 100, 50), (17, 64, 41), (33, 40, 19), (1, 1, 1))
"""Tokens, hidden size, neurons."""


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Fresh random input in every run, on the device of the kernels; pytest shows the seed of a failing test."""
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    random.seed(value)
    torch.set_num_threads(1)
    # The kernels multiply float32 exactly; twins that round to TF32, as some images ask for, would be far outside.
    torch.set_float32_matmul_precision("highest")
    with DEVICE:
        yield value


@dataclass
class Case:
    """One random FFN and its input."""

    inputs: torch.Tensor
    gate_up: torch.Tensor
    down_rows: torch.Tensor
    activation: Activation
    gate_first: bool

    @classmethod
    def draw(cls, tokens: int, width: int, neurons: int, dtype: torch.dtype, activation: str | None = None) -> Case:
        return cls(
            torch.randn(tokens, width).to(dtype),
            (torch.randn(2 * neurons, width) / width**0.5).to(dtype),
            (torch.randn(neurons, width) / width**0.5).to(dtype),
            Activation(activation or random.choice(list(Activation))),
            random.random() < 0.5,
        )

    @property
    def neurons(self) -> int:
        return self.down_rows.shape[0]

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up rows."""
        first, second = self.gate_up.split(self.neurons)
        return (first, second) if self.gate_first else (second, first)

    def coarse(self, module: object, indices: torch.Tensor) -> torch.Tensor:
        arguments = (self.inputs, self.gate_up, self.down_rows, indices, self.activation, self.gate_first)
        return module.coarse_ffn(*arguments)  # type: ignore[attr-defined]

    def fine(self, module: object, num_kept: int) -> torch.Tensor:
        arguments = (self.inputs, self.gate_up, self.down_rows, num_kept, self.activation, self.gate_first)
        return module.fine_ffn(*arguments)  # type: ignore[attr-defined]

    def gate_and_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``act(gate)`` and up, fp32 ``[tokens, neurons]``."""
        gate, up = (self.inputs.float() @ rows.float().T for rows in self.halves())
        return self.activation.function(gate), up


def random_subset(neurons: int, kept: int) -> torch.Tensor:
    """Kept neurons, followed in memory by an index that is nowhere near one: reading its row ends the process."""
    chosen = torch.randperm(neurons)[:kept].sort().values.to(torch.int32)
    return torch.cat([chosen, torch.full((64,), 2**31 - 1, dtype=torch.int32)])[:kept]


def assert_close(case: Case, actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    """Within fp32 sums in another order, four hidden values and an output that rounded the other way.

    One neuron that is missing or too many is far outside.
    """
    assert actual.dtype == case.inputs.dtype
    assert actual.shape == case.inputs.shape
    gate, up = case.gate_and_up()
    down = case.down_rows.float().abs()
    unit = torch.finfo(case.inputs.dtype).eps
    allowed = 3e-6 * ((1 + gate.abs()) * (1 + up.abs()) * mask) @ down + torch.finfo(case.inputs.dtype).smallest_normal
    allowed += unit * expected.float().abs()
    if case.inputs.dtype != torch.float32:
        hidden = (gate * up * mask).abs()
        allowed += 4 * unit * torch.stack([(token[:, None] * down).amax(0) for token in hidden])
    error = (actual.float() - expected.float()).abs()
    assert (error <= allowed).all(), f"{tuple(actual.shape)} of {case.neurons} neurons: off by {error.max():.3g}"


def assert_coarse(case: Case, indices: torch.Tensor) -> None:
    mask = torch.zeros(case.inputs.shape[0], case.neurons)
    mask[:, indices.long()] = 1.0
    assert_close(case, case.coarse(kernels, indices), case.coarse(reference, indices), mask)


def assert_fine(case: Case, num_kept: int) -> None:
    order = case.gate_and_up()[0].abs().sort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order.values).scatter_(-1, order.indices[:, :num_kept], 1.0)
    # Where the cut runs between nearly equal magnitudes, the order of summation decides and both are right.
    clear = torch.ones(mask.shape[0], dtype=torch.bool)
    if 0 < num_kept < case.neurons:
        clear = order.values[:, num_kept - 1] - order.values[:, num_kept] > 1e-5
    actual, expected = case.fine(kernels, num_kept), case.fine(reference, num_kept)
    assert_close(case, *(torch.where(clear[:, None], output, 0.0) for output in (actual, expected)), mask)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_their_twins(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    case = Case.draw(*shape, dtype)
    for kept in sorted({0, 1, random.randint(0, case.neurons), case.neurons}):
        assert_coarse(case, random_subset(case.neurons, kept))
        assert_fine(case, kept)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("activation", list(Activation))
def test_every_activation_and_both_orders_of_the_halves(activation: Activation, gate_first: bool) -> None:
    for tokens in (1, 4):
        case = Case.draw(tokens, 48, 30, torch.bfloat16, activation)
        case.gate_first = gate_first
        assert_coarse(case, random_subset(30, 13))
        assert_fine(case, 13)


@pytest.mark.parametrize("tokens", [1, 5])
def test_every_choice_of_tiles_is_right(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device, dtype = DEVICE, torch.bfloat16
    case = Case.draw(tokens, 200, 75, dtype)
    indices = random_subset(75, 40)
    for tiles in tuning.row_candidates(tokens, dtype, device):
        monkeypatch.setattr(kernels, "row_candidates", lambda *_, chosen=tiles: [chosen])
        assert_coarse(case, indices)
    assert_fine(case, 40)
    monkeypatch.undo()
    for tiles in tuning.down_candidates(tokens, dtype, device):
        monkeypatch.setattr(kernels, "down_candidates", lambda *_, chosen=tiles: [chosen])
        assert_coarse(case, indices)
    assert_fine(case, 40)
    monkeypatch.undo()
    for tiles in tuning.stream_candidates(200, dtype, device):
        monkeypatch.setattr(kernels, "stream_candidates", lambda *_, chosen=tiles: [chosen])
        assert_coarse(case, indices)
    assert_fine(case, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_too_wide_for_a_stream(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "WIDEST_STREAM", 64)
    case = Case.draw(1, 65, 30, dtype)
    assert_coarse(case, random_subset(30, 17))
    assert_fine(case, 17)


def test_no_tokens_and_no_neurons() -> None:
    case = Case.draw(0, 64, 8, torch.bfloat16)
    assert case.coarse(kernels, random_subset(8, 4)).shape == (0, 64)
    assert case.fine(kernels, 4).shape == (0, 64)
    case = Case.draw(3, 64, 8, torch.bfloat16)
    assert not case.coarse(kernels, random_subset(8, 0)).any()
    assert not case.fine(kernels, 0).any()


@pytest.mark.parametrize("tokens", [1, 9])
def test_ties_keep_the_lower_index(tokens: int) -> None:
    """Small integers make gates exact in any order of summation, and ties plenty."""
    case = Case.draw(tokens, 24, 60, torch.float32, "silu")
    case.inputs.copy_(torch.randint(-1, 2, case.inputs.shape))
    case.halves()[0].copy_(torch.randint(-1, 2, (60, 24)))
    magnitude = case.gate_and_up()[0].abs()
    for kept in random.sample(range(1, 60), 4):
        mask = torch.zeros_like(magnitude)
        for token in range(tokens):
            ranked = sorted(range(60), key=lambda j: (-magnitude[token, j].item(), j))
            mask[token, ranked[:kept]] = 1.0
        assert_close(case, case.fine(kernels, kept), case.fine(reference, kept), mask)


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_of_dropped_neurons_are_not_used(tokens: int) -> None:
    case = Case.draw(tokens, 40, 30, torch.float32, "silu")
    gate, up = case.halves()
    indices = random_subset(30, 12)
    dropped = torch.ones(30, dtype=torch.bool)
    dropped[indices.long()] = False
    kept_gate = gate.clone()
    gate[dropped] = up[dropped] = case.down_rows[dropped] = float("nan")
    assert torch.isfinite(case.coarse(kernels, indices)).all()
    # A gate row of zeros is the smallest there is.
    gate.copy_(kept_gate)
    gate[dropped] = 0.0
    assert torch.isfinite(case.fine(kernels, 12)).all()


def test_shards_add_up_to_the_whole() -> None:
    case = Case.draw(2, 64, 30, torch.float32, "silu")
    case.gate_first = True
    indices = random_subset(30, 16)
    parts = []
    for shard in (slice(0, 11), slice(11, 30)):
        rows = torch.cat([half[shard] for half in case.halves()])
        local = indices[(indices >= shard.start) & (indices < shard.stop)] - shard.start
        part = Case(case.inputs, rows, case.down_rows[shard].contiguous(), case.activation, True)
        parts.append(part.coarse(kernels, local))
    torch.testing.assert_close(parts[0] + parts[1], case.coarse(reference, indices), rtol=1e-4, atol=1e-5)


def test_runs_repeat_and_write_where_they_are_told() -> None:
    case = Case.draw(4, 72, 40, torch.bfloat16)
    indices = random_subset(40, 20)
    arguments = (case.gate_up, case.down_rows)
    wide = torch.randn(4, 144).bfloat16()
    wide[:, ::2] = case.inputs
    out = torch.full_like(case.inputs, 7.0)
    result = kernels.coarse_ffn(wide[:, ::2], *arguments, indices, case.activation, case.gate_first, out=out)
    assert result is out
    assert torch.equal(out, case.coarse(kernels, indices))
    out.fill_(7.0)
    assert kernels.fine_ffn(case.inputs, *arguments, 20, case.activation, case.gate_first, out=out) is out
    assert torch.equal(out, case.fine(kernels, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    partial = torch.randn(1, 2000) * 2.0 ** torch.randint(-10, 11, (1, 2000))
    partial[0, :2] = torch.tensor([1.998, -1.0039063])
    output = torch.empty(2001, dtype=dtype).fill_(3.0)
    projection.sum_parts_kernel[(4,)](partial, output, 2000, num_parts=1, block_outputs=512)
    assert torch.equal(output[:2000], partial[0].to(dtype))
    assert output[2000] == 3.0


def test_wrong_arguments_are_refused() -> None:
    case = Case.draw(2, 16, 4, torch.float32)
    weights = (case.gate_up, case.down_rows)
    indices = torch.arange(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="indices must be contiguous int32"):
        kernels.coarse_ffn(case.inputs, *weights, indices.long(), "silu")
    with pytest.raises(ValueError, match="inputs must be"):
        kernels.coarse_ffn(case.inputs.bfloat16(), *weights, indices, "silu")
    with pytest.raises(ValueError, match="gate_up must be"):
        kernels.fine_ffn(case.inputs, case.gate_up[:6], case.down_rows, 2, "silu")
    with pytest.raises(ValueError, match="down_rows must be contiguous"):
        kernels.fine_ffn(case.inputs, case.gate_up, case.down_rows.T, 2, "silu")
    with pytest.raises(ValueError, match=r"num_kept must lie in \[0, 4\], not 5"):
        kernels.fine_ffn(case.inputs, *weights, 5, "silu")
    with pytest.raises(ValueError, match="out must be contiguous"):
        kernels.fine_ffn(case.inputs, *weights, 2, "silu", out=torch.empty(2, 15))
    with pytest.raises(ValueError, match="relu"):
        kernels.fine_ffn(case.inputs, *weights, 2, "relu")


@pytest.mark.parametrize("order", ["neighbours", "any"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "neurons", "offset"), [(1, 64, 0), (5, 33, 40), (16, 130, 7), (70, 65, 64)])
def test_statistics_equal_their_twin(tokens: int, neurons: int, offset: int, dtype: torch.dtype, order: str) -> None:
    slots, rows, total = 5, 9, offset + neurons + 3
    activation = torch.randn(tokens, neurons + 1).to(dtype)[:, :neurons]
    activation[tokens // 2] = 0.0
    slot = torch.randint(-1, slots, (tokens,), dtype=torch.int32)
    slot = slot.sort().values if order == "neighbours" else slot
    row = torch.full((tokens,), -1, dtype=torch.int32)
    waiting = torch.randperm(tokens)[: min(tokens, rows)]
    row[waiting] = torch.randperm(rows)[: waiting.numel()].to(torch.int32)
    weight = torch.rand(tokens)
    # A row before and after the tables, which nothing may touch.
    energy, pending = torch.rand(slots + 2, total), torch.rand(rows + 2, total).bfloat16()
    expected_energy, expected_pending = energy.clone(), pending.clone()
    statistics.observe_ffn(activation, slot, weight, row, energy[1:-1], pending[1:-1], offset)
    reference.observe_ffn(activation, slot, weight, row, expected_energy[1:-1], expected_pending[1:-1], offset)
    torch.testing.assert_close(energy, expected_energy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pending, expected_pending, rtol=2**-7, atol=0.0)


def test_tokens_that_do_not_count_leave_no_trace() -> None:
    energy, pending = torch.rand(3, 20), torch.rand(4, 20).bfloat16()
    before = energy.clone(), pending.clone()
    nobody = torch.full((6,), -1, dtype=torch.int32)
    activation = torch.full((6, 20), float("nan"))
    statistics.observe_ffn(activation, nobody, torch.ones(6), nobody, energy, pending, 0)
    empty = torch.empty(0, dtype=torch.int32)
    statistics.observe_ffn(torch.empty(0, 20), empty, torch.empty(0), empty, energy, pending, 0)
    assert torch.equal(energy, before[0])
    assert torch.equal(pending, before[1])


def test_wrong_tables_are_refused() -> None:
    slot = torch.zeros(2, dtype=torch.int32)
    tables = torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="token_slot must be contiguous"):
        statistics.observe_ffn(torch.ones(2, 8), slot.long(), torch.ones(2), slot, *tables, 0)
    with pytest.raises(ValueError, match="energy must be"):
        statistics.observe_ffn(torch.ones(2, 8), slot, torch.ones(2), slot, *tables, 1)
    with pytest.raises(ValueError, match="activation must be"):
        statistics.observe_ffn(torch.ones(8, 2).T, slot, torch.ones(2), slot, *tables, 0)


def test_picked_tokens_equal_the_loop_and_the_twin() -> None:
    for _ in range(40):
        width = random.randint(1, 17)
        counts = [random.randint(0, width) for _ in range(random.randint(0, 6))]
        cu_num_logits = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        rows = sum(counts)
        own, draft = torch.randint(0, 99, (rows,)), torch.randint(-1, 99, (rows,))
        accepted = torch.rand(rows) < 0.8
        sampled, num_sampled = pick_tokens(own, draft, accepted, cu_num_logits, width)
        expected = pick_tokens_reference(own, draft, accepted, cu_num_logits, width)
        assert torch.equal(sampled, expected[0])
        assert torch.equal(num_sampled, expected[1])
        for request, count in enumerate(counts):
            tokens = []
            for row in range(cu_num_logits[request], cu_num_logits[request + 1]):
                tokens.append(own[row].item())
                if not accepted[row] or len(tokens) == count:
                    break
                tokens[-1] = draft[row].item()
            assert sampled[request].tolist() == tokens + [-1] * (width - len(tokens))
            assert num_sampled[request] == len(tokens)
