"""The CPU kernels compute what their PyTorch twins compute, and building them behaves."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vllm_sirius.kernels import reference
from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.cpu import build, kernels
from vllm_sirius.kernels.cpu.library_store import CHECKSUM, LIBRARY, LOCK
from vllm_sirius.weights.memory import empty_on_huge_pages
from vllm_sirius.weights.rows import gates_first, neuron_rows

WIDTHS = (1, 7, 33, 896, 1537)
NUM_NEURONS = (1, 5, 176)
NUM_TOKENS = (1, 2, 3, 8, 17, 32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(Activation)

HAS_COMPILER = bool(os.environ.get("CXX")) or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
pytestmark = [
    pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("fresh_input", "one_thread"),
]


@dataclass(frozen=True)
class Case:
    """One random FFN and its input."""

    inputs: torch.Tensor
    rows: torch.Tensor
    activation: Activation

    @classmethod
    def draw(
        cls, tokens: int, width: int, neurons: int, dtype: torch.dtype, activation: Activation = Activation.SILU
    ) -> Case:
        inputs = torch.randn(tokens, width).to(dtype)
        rows = empty_on_huge_pages((neurons, 3, width), dtype)
        rows.copy_(torch.randn(neurons, 3, width) / width**0.5)
        return cls(inputs, rows, activation)

    @property
    def fine_rows(self) -> torch.Tensor:
        """The rows as the kernel for fine sparsity reads them."""
        gate, up, down = self.rows.unbind(1)
        return neuron_rows(torch.cat([gate, up]), down.T, layout=gates_first)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate before its activation, up, and down rows, fp32."""
        weights, inputs = self.rows.float(), self.inputs.float()
        return inputs @ weights[:, 0].T, inputs @ weights[:, 1].T, weights[:, 2]


def random_subset(neurons: int, kept: int) -> torch.Tensor:
    return torch.randperm(neurons)[:kept].sort().values.to(torch.int32)


def stated_error(case: Case, mask: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The most that kernel and twin may differ, per output.

    fp32 sums in another order, four hidden values that fell on the other side of a rounding boundary, one unit in the
    last place of the output. One neuron that is missing or too many is far outside.

    Args:
        case: The FFN.
        mask: ``[tokens, neurons]``, 1 where a neuron is kept.
        expected: ``[tokens, hidden]`` of the twin.
    """
    gate, up, down = case.parts()
    unit = torch.finfo(case.rows.dtype).eps
    summation = 3e-6 * ((1 + gate.abs()) * (1 + up.abs()) * mask) @ down.abs()
    largest = torch.zeros_like(summation)
    if unit > torch.finfo(torch.float32).eps:
        hidden = (case.activation.function(gate) * up * mask).abs()
        largest = torch.stack([(token[:, None] * down.abs()).amax(0) for token in hidden])
    tiny = torch.finfo(case.rows.dtype).smallest_normal
    return summation + 4 * unit * largest + unit * expected.float().abs() + tiny


def assert_coarse(case: Case, indices: torch.Tensor) -> None:
    actual = kernels.coarse_ffn(case.inputs, case.rows, indices, case.activation)
    expected = reference.coarse_ffn(case.inputs, case.rows, indices, case.activation)
    mask = torch.zeros(case.inputs.shape[0], case.rows.shape[0])
    mask[:, indices.long()] = 1.0
    assert actual.dtype == case.inputs.dtype
    assert actual.shape == case.inputs.shape
    assert_close(case, actual, expected, mask)


def assert_close(case: Case, actual: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    error = (actual.float() - expected.float()).abs()
    excess = error - stated_error(case, mask, expected)
    assert excess.max() <= 0, f"{tuple(case.inputs.shape)} of {case.rows.shape[0]} neurons: off by {error.max():.3g}"


def assert_fine(case: Case, num_kept: int) -> None:
    gate, _, _ = case.parts()
    magnitude = case.activation.function(gate).abs()
    order = magnitude.sort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(gate).scatter_(-1, order.indices[:, :num_kept], 1.0)
    # Where the cut runs between nearly equal magnitudes, the order of summation decides and both are right.
    clear = torch.ones(gate.shape[0], dtype=torch.bool)
    if 0 < num_kept < gate.shape[1]:
        clear = order.values[:, num_kept - 1] - order.values[:, num_kept] > 1e-5
    actual = kernels.fine_ffn(case.inputs, case.fine_rows, num_kept, case.activation)
    expected = reference.fine_ffn(case.inputs, case.rows, num_kept, case.activation)
    assert actual.dtype == case.inputs.dtype
    assert actual.shape == case.inputs.shape
    actual, expected = (torch.where(clear[:, None], output, 0.0) for output in (actual, expected))
    assert_close(case, actual, expected, mask)


def assert_both(tokens: int, width: int, neurons: int, dtype: torch.dtype, activation: Activation) -> None:
    case = Case.draw(tokens, width, neurons, dtype, activation)
    for kept in sorted({0, 1, random.randint(0, neurons), neurons}):
        assert_coarse(case, random_subset(neurons, kept))
        assert_fine(case, kept)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_their_twins(dtype: torch.dtype, activation: Activation) -> None:
    for width in WIDTHS:
        for neurons in NUM_NEURONS:
            for tokens in NUM_TOKENS:
                assert_both(tokens, width, neurons, dtype, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_tokens_than_one_pass_takes(dtype: torch.dtype) -> None:
    assert_both(71, 100, 40, dtype, Activation.SILU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_and_no_neurons(dtype: torch.dtype) -> None:
    case = Case.draw(0, 64, 8, dtype)
    assert kernels.coarse_ffn(case.inputs, case.rows, random_subset(8, 4), "silu").shape == (0, 64)
    assert kernels.fine_ffn(case.inputs, case.fine_rows, 4, "silu").shape == (0, 64)
    case = Case.draw(3, 64, 8, dtype)
    assert not kernels.coarse_ffn(case.inputs, case.rows, random_subset(8, 0), "silu").any()
    assert not kernels.fine_ffn(case.inputs, case.fine_rows, 0, "silu").any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_keeping_all_is_the_dense_ffn(activation: Activation) -> None:
    case = Case.draw(5, 129, 77, torch.float32, activation)
    gate_weight, up_weight, down_rows = (case.rows[:, which].double() for which in range(3))
    inputs = case.inputs.double()
    gate = torch.nn.functional.linear(inputs, gate_weight)
    hidden = activation.function(gate) * torch.nn.functional.linear(inputs, up_weight)
    dense = torch.nn.functional.linear(hidden, down_rows.T)
    coarse = kernels.coarse_ffn(case.inputs, case.rows, torch.arange(77, dtype=torch.int32), activation)
    fine = kernels.fine_ffn(case.inputs, case.fine_rows, 77, activation)
    torch.testing.assert_close(coarse.double(), dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fine.double(), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_keep_the_lower_index(dtype: torch.dtype) -> None:
    """Small integers make gates exact in any order of summation, and ties plenty."""
    neurons, width = 150, 24
    case = Case.draw(9, width, neurons, dtype)
    case.inputs.copy_(torch.randint(-1, 2, case.inputs.shape))
    case.rows[:, 0] = torch.randint(-1, 2, (neurons, width)).to(dtype)
    gate, _, _ = case.parts()
    magnitude = Activation.SILU.function(gate).abs()
    for kept in random.sample(range(1, neurons), 20):
        mask = torch.zeros_like(gate)
        for token in range(gate.shape[0]):
            ranked = sorted(range(neurons), key=lambda j: (-magnitude[token, j].item(), j))
            mask[token, ranked[:kept]] = 1.0
        expected = reference.fine_ffn(case.inputs, case.rows, kept, "silu")
        assert_close(case, kernels.fine_ffn(case.inputs, case.fine_rows, kept, "silu"), expected, mask)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing_but_rounding(threads: int) -> None:
    torch.set_num_threads(threads)
    for tokens in (1, 3, 32):
        for neurons in (3, 176):
            assert_both(tokens, 200, neurons, torch.bfloat16, Activation.SILU)
    case = Case.draw(4, 200, 176, torch.bfloat16)
    indices = random_subset(176, 88)
    coarse = [kernels.coarse_ffn(case.inputs, case.rows, indices, "silu") for _ in range(5)]
    fine = [kernels.fine_ffn(case.inputs, case.fine_rows, 88, "silu") for _ in range(5)]
    assert all(torch.equal(output, coarse[0]) for output in coarse)
    assert all(torch.equal(output, fine[0]) for output in fine)


def test_strided_inputs_are_accepted() -> None:
    case = Case.draw(3, 64, 20, torch.float32)
    wide = torch.randn(3, 128)
    wide[:, ::2] = case.inputs
    assert_coarse(Case(wide[:, ::2], case.rows, Activation.SILU), random_subset(20, 10))


def test_wrong_arguments_are_refused() -> None:
    case = Case.draw(2, 16, 4, torch.float32)
    indices = torch.arange(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="indices must be contiguous int32"):
        kernels.coarse_ffn(case.inputs, case.rows, indices.long(), "silu")
    with pytest.raises(ValueError, match="inputs must be"):
        kernels.coarse_ffn(case.inputs.bfloat16(), case.rows, indices, "silu")
    with pytest.raises(ValueError, match="inputs must be"):
        kernels.fine_ffn(case.inputs[:, :8], case.fine_rows, 2, "silu")
    with pytest.raises(ValueError, match=r"\[neurons, 3, hidden\]"):
        kernels.coarse_ffn(case.inputs, case.fine_rows, indices, "silu")
    with pytest.raises(ValueError, match=r"\[3 \* neurons, hidden\]"):
        kernels.fine_ffn(case.inputs, case.rows, 2, "silu")
    with pytest.raises(ValueError, match=r"\[3 \* neurons, hidden\]"):
        kernels.fine_ffn(case.inputs, case.fine_rows[:11], 2, "silu")
    with pytest.raises(ValueError, match="rows must be contiguous"):
        kernels.coarse_ffn(case.inputs, torch.randn(3, 3, 16).transpose(0, 1), indices, "silu")
    with pytest.raises(ValueError, match="rows must be contiguous"):
        kernels.fine_ffn(case.inputs.double(), case.fine_rows.double(), 2, "silu")
    with pytest.raises(ValueError, match="num_kept must lie"):
        kernels.fine_ffn(case.inputs, case.fine_rows, 5, "silu")
    with pytest.raises(ValueError, match="relu"):
        kernels.fine_ffn(case.inputs, case.fine_rows, 2, "relu")
    for outside in (4, -1):
        with pytest.raises(IndexError, match=r"\[0, 4\)"):
            kernels.coarse_ffn(case.inputs, case.rows, torch.tensor([0, outside], dtype=torch.int32), "silu")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("-DSIRIUS_PREFER_BF16", ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "scalar")),
        ("-mno-avx512bf16", ("avx512_vnni", "avx512", "avx2", "scalar")),
        ("-mno-avx512bf16 -mno-avx512vnni", ("avx512", "avx2", "scalar")),
        ("-mno-avx512f", ("avx2", "scalar")),
        ("-mno-avx2", ("scalar",)),
    ],
)
def test_older_processors(
    option: str,
    names: tuple[str, ...],
    library_without: Callable[[str], ctypes.CDLL],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = library_without(option)
    monkeypatch.setattr(kernels, "load_library", lambda: library)
    assert kernels.instruction_set() in names
    for dtype in DTYPES:
        for tokens, width, neurons in ((1, 1, 1), (3, 33, 5), (17, 200, 50)):
            assert_both(tokens, width, neurons, dtype, Activation.SILU)


def test_second_build_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.sirius")
    commands: list[list[str]] = []
    run = build._run

    def recording(command: list[str]) -> str:
        commands.append(command)
        return run(command)

    monkeypatch.setattr(build, "_run", recording)
    monkeypatch.setattr(build, "FLAGS", ("-std=c++17", "-O0", "-fPIC", "-shared"))
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    first = build.build_library()
    assert first.is_relative_to(tmp_path)
    before, after = (record.getMessage() for record in caplog.records)
    assert before.startswith("Sirius: compiling CPU kernels")
    assert re.fullmatch(r"Sirius: CPU kernels compiled in \d+ s", after)
    assert sum("-o" in command for command in commands) == 1
    written = first.stat().st_mtime_ns
    assert build.build_library() == first
    assert sum("-o" in command for command in commands) == 1
    assert first.stat().st_mtime_ns == written
    assert len(caplog.records) == 2
    monkeypatch.setattr(build, "FLAGS", ("-std=c++17", "-O0", "-fPIC", "-shared", "-DOTHER"))
    assert build.build_library() != first


def test_failing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIRIUS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(build.KernelBuildError, match="/bin/false"):
        build.load_library.__wrapped__()
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such instruction" >&2\nexit 3\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.KernelBuildError, match="no such instruction"):
        build.load_library.__wrapped__()
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(build.KernelBuildError, match="missing"):
        build.load_library.__wrapped__()
    assert not list(tmp_path.rglob("*.so*"))


def test_unusable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    monkeypatch.setenv("SIRIUS_CACHE", str(occupied))
    with pytest.raises(build.KernelBuildError, match=r"is not a folder.*set SIRIUS_CACHE"):
        build.build_library()


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    program = (
        "from vllm_sirius.kernels.cpu import build, kernels; import torch\n"
        "build.FLAGS = tuple('-O0' if flag == '-O3' else flag for flag in build.FLAGS)\n"
        "kernels.fine_ffn(torch.ones(1, 8), torch.ones(12, 8), 2, 'silu'); print(build.build_library())\n"
    )
    environment = {**os.environ, "SIRIUS_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [LOCK, LIBRARY, CHECKSUM]


def test_no_second_openmp_runtime() -> None:
    """A second runtime would bring threads of its own, which fight with PyTorch's for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    program = (
        "import os, torch\n"
        "loaded = lambda: {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in os.path.basename(l.split()[-1])}\n"
        "torch.randn(1 << 22).sum(); before = loaded(), len(os.listdir('/proc/self/task'))\n"
        "from vllm_sirius.kernels.cpu import kernels\n"
        "kernels.fine_ffn(torch.ones(1, 8), torch.ones(192, 8), 2, 'silu')\n"
        "assert (loaded(), len(os.listdir('/proc/self/task'))) == before, (before, loaded())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)
