"""The Triton kernels in Triton's interpreter, where they cannot run, and what their host side does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_sirius.acceptance import emit_tokens
from vllm_sirius.kernels.triton import arguments, kernels, reference, statistics, tuning
from vllm_sirius.kernels.triton.acceptance import pick_tokens, pick_tokens_reference
from vllm_sirius.kernels.triton.runtime import TritonUnavailableError
from vllm_sirius.kernels.triton.tuning import Tiles, Tuner
from vllm_sirius.sparsity.statistics import NeuronStatistics, ObservedRows

ROOT = Path(__file__).parent.parent.parent


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(part for part in [str(ROOT), *sys.path] if part)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_twins(TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_equal_their_twins_on_a_gpu() -> None:
    run_twins(TRITON_INTERPRET="0")


def run_twins(**variables: str) -> None:
    tests = str(Path(__file__).with_name("triton_twins.py"))
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", tests, **variables)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from vllm_sirius.kernels.triton.acceptance import pick_tokens
from vllm_sirius.kernels.triton import kernels, reference, statistics, tuning
from vllm_sirius.kernels.triton.runtime import TritonUnavailableError
assert "vllm" not in sys.modules
weights = torch.ones(4, 8), torch.ones(2, 8)
assert reference.fine_ffn(torch.ones(1, 8), *weights, 1, "silu").shape == (1, 8)
tokens = torch.ones(1, dtype=torch.int64)
calls = [
    lambda: kernels.fine_ffn(torch.ones(1, 8), *weights, 1, "silu"),
    lambda: kernels.coarse_ffn(torch.ones(1, 8), *weights, torch.zeros(1, dtype=torch.int32), "silu"),
    lambda: pick_tokens(tokens, tokens, tokens > 0, torch.tensor([0, 1], dtype=torch.int32), 1),
]
for call in calls:
    try:
        call()
    except TritonUnavailableError as error:
        assert "not installed" in str(error), error
    else:
        raise AssertionError("ran without Triton")
"""


def test_modules_can_be_imported_without_triton() -> None:
    result = run_python("-c", WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels run on CPU in the interpreter")
def test_tensors_on_cpu_are_refused() -> None:
    pytest.importorskip("triton")
    inputs, gate_up, down_rows = torch.ones(1, 8), torch.ones(4, 8), torch.ones(2, 8)
    slot = torch.zeros(1, dtype=torch.int32)
    tables = torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bfloat16)
    with pytest.raises(TritonUnavailableError, match="need tensors on a GPU, not on cpu"):
        kernels.fine_ffn(inputs, gate_up, down_rows, 1, "silu")
    with pytest.raises(TritonUnavailableError, match="TRITON_INTERPRET=1"):
        statistics.observe_ffn(inputs, slot, torch.ones(1), slot, *tables, 0)


class Launches:
    """Stands for a kernel: counts launches and computes nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.grids.append(grid)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launches]:
    """Kernels that compute nothing, by name, so that their host side runs on any device."""
    found: dict[str, Launches] = {}
    for module in (arguments, statistics):
        monkeypatch.setattr(module, "require_triton", lambda tensor: None)
    for module in (kernels, statistics):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, found.setdefault(name, Launches()))
    return found


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_nothing_waits_for_the_device(tokens: int, launches: dict[str, Launches]) -> None:
    """Tensors on `meta` have no values: whatever would read one on the host is an error."""
    with torch.device("meta"):
        inputs, gate_up, down_rows = torch.empty(tokens, 64), torch.empty(200, 64), torch.empty(100, 64)
        indices = torch.empty(50, dtype=torch.int32)
        slot = torch.empty(tokens, dtype=torch.int32)
        tables = torch.empty(4, 300), torch.empty(4, 300, dtype=torch.bfloat16)
        weight, activation = torch.empty(tokens), torch.empty(tokens, 100)
    assert kernels.coarse_ffn(inputs, gate_up, down_rows, indices, "silu").shape == (tokens, 64)
    assert kernels.fine_ffn(inputs, gate_up, down_rows, 50, "silu").shape == (tokens, 64)
    statistics.observe_ffn(activation, slot, weight, slot, *tables, 100)
    reference.observe_ffn(activation, slot, weight, slot, *tables, 100)
    with pytest.raises(RuntimeError, match="meta"):
        slot.max().item()
    unused = {name for name, kernel in launches.items() if not kernel.grids}
    one = {"list_kept_kernel", "gate_up_kernel", "up_kernel", "down_kernel", "sum_parts_kernel"}
    many = {"stream_coarse_kernel", "stream_fine_kernel", "sum_programs_kernel"}
    assert unused == (one if tokens == 1 else many)


def test_statistics_twin_is_what_the_statistics_learn() -> None:
    layers, tokens = (12, 7), 6
    learned = NeuronStatistics(layers, 3, 8, torch.device("cpu"), decay=1.0)
    slots = [learned.acquire(), learned.acquire()]
    learned.begin_step([ObservedRows(slots[0], 0, 2, False), ObservedRows(slots[1], 3, 3, False)])
    activation = torch.randn(tokens, 7)
    learned.observe(1, activation)
    token_slot = torch.tensor([slots[0]] * 2 + [-1] + [slots[1]] * 3, dtype=torch.int32)
    energy, pending = torch.zeros(3, 19), torch.zeros(2, 19, dtype=torch.bfloat16)
    row = torch.tensor([-1, 1, -1, -1, 0, -1], dtype=torch.int32)
    reference.observe_ffn(activation, token_slot, torch.ones(tokens), row, energy, pending, 12)
    torch.testing.assert_close(energy, learned.energy)
    share = activation.square() / activation.square().sum(dim=1, keepdim=True)
    assert torch.equal(pending[:, 12:], share[[4, 1]].bfloat16())
    assert not pending[:, :12].any()


def test_picking_twin_emits_what_acceptance_emits() -> None:
    for _ in range(20):
        num_drafts = torch.randint(0, 5, (3,))
        begin = torch.cat([torch.zeros(1, dtype=torch.int64), (num_drafts + 1).cumsum(0)]).to(torch.int32)
        rows = int(begin[-1])
        own, draft, accepted = torch.randint(0, 9, (rows,)), torch.randint(0, 9, (rows,)), torch.rand(rows) < 0.7
        last = (begin[1:] - 1).long()
        judges = torch.ones(rows, dtype=torch.bool)
        judges[last] = False
        expected = emit_tokens(draft[judges], own[judges], accepted[judges], num_drafts, own[last], 4)
        sampled, num_sampled = pick_tokens_reference(own, draft, accepted, begin, 5)
        assert torch.equal(sampled, expected.long())
        assert torch.equal(num_sampled, (expected >= 0).sum(dim=1).to(torch.int32))


def test_picking_for_no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_sirius.kernels.triton.acceptance.require_triton", lambda tensor: None)
    nothing = torch.empty(0, dtype=torch.int64)
    for pick in (pick_tokens, pick_tokens_reference):
        sampled, num_sampled = pick(nothing, nothing, nothing > 0, torch.zeros(1, dtype=torch.int32), 4)
        assert sampled.shape == (0, 4)
        assert num_sampled.shape == (0,)


def test_tuner_measures_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def fastest(candidates: list[Tiles], launch: Callable[[Tiles], torch.Tensor]) -> Tiles:
        measured.append(candidates)
        return candidates[-1]

    monkeypatch.setattr(tuning, "_fastest", fastest)
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    tuner, candidates = Tuner(), [Tiles(4, 64), Tiles(8, 64), Tiles(16, 64)]
    used: list[Tiles] = []

    def run(shape: int) -> Tiles:
        tuner.run("kernel", (shape,), lambda: candidates, lambda tiles: used.append(tiles) or torch.empty(0))
        return used[-1]

    assert run(1) == candidates[0]
    with tuner.tuning():
        assert run(1) == run(1) == candidates[-1]
        capturing = True
        assert run(2) == candidates[0]
    assert run(1) == candidates[-1]
    assert run(3) == candidates[0]
    assert len(measured) == 1
    assert tuner.chosen() == {("kernel", 1): candidates[-1]}


@pytest.mark.parametrize("fine", [True, False])
def test_warm_up_tunes_every_batch_size(
    fine: bool, launches: dict[str, Launches], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = Tuner()
    monkeypatch.setattr(kernels, "_TUNER", tuner)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_fastest", lambda candidates, launch: candidates[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with torch.device("meta"):
        gate_up, down_rows = torch.empty(200, 64), torch.empty(100, 64)
        indices = torch.empty(30, dtype=torch.int32)
    kernels.warm_up(gate_up, down_rows, 30, "silu", fine=fine)
    tuned = kernels.tuned_tiles()
    # One token streams after its gates; more have a product for each of gate, up and down, or gate with up and down.
    assert len(tuned) == (2 + 2 * 3 if fine else 1 + 2 * 2)
    for tokens in range(1, 70):
        inputs = torch.empty(tokens, 64, device="meta")
        with tuner.tuning():
            if fine:
                kernels.fine_ffn(inputs, gate_up, down_rows, 30, "silu")
            else:
                kernels.coarse_ffn(inputs, gate_up, down_rows, indices, "silu")
    assert kernels.tuned_tiles() == tuned


def test_tiles_fit_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for limit in (227 << 10, 99 << 10, 40 << 10, 1 << 10):
        monkeypatch.setattr(tuning, "_shared_memory_limit", lambda device, limit=limit: limit)
        for tokens in (1, 2, 16, 17, 64):
            for candidates in (tuning.row_candidates, tuning.down_candidates):
                chosen = candidates(tokens, torch.float32, device)
                block = max(tuning.token_block(tokens), 16)
                needed = [tiles.shared_memory(block, 4) for tiles in chosen]
                assert max(needed) <= limit or len(chosen) == 1
                assert all(tiles.tensor_cores for tiles in chosen) or tokens == 1
            streams = tuning.stream_candidates(4096, torch.float32, device)
            assert streams[0].stages == 1
            assert all(tiles.stages == 1 or tiles.rows * 4096 * 12 <= limit for tiles in streams)
    assert [tuning.token_block(tokens) for tokens in (0, 1, 2, 16, 17, 999)] == [1, 1, 16, 16, 32, 32]
