"""The GPU benchmark computes what it says, as far as a machine without a GPU can tell."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import report, run
from benchmarks.gpu.shapes import SHAPES

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Timing:
    """Stands for an arm."""

    name: str
    num_bytes: int
    median: float
    spread: float = 0.0


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.run", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_check_passes() -> None:
    pytest.importorskip("triton")
    result = run_benchmark("--check")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": ok") == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_plainly() -> None:
    result = run_benchmark()
    assert result.returncode == 1
    assert result.stderr == "No GPU: this machine can only run the correctness check, --check.\n"


def test_benchmark_needs_no_vllm() -> None:
    program = (
        "import sys\n"
        "from benchmarks.gpu import check, decoder, glue, measure, report, run\n"
        "assert not any(name.split('.')[0] == 'vllm' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300)


def test_shapes_have_the_parameters_of_their_models() -> None:
    parameters = {
        name: shape.num_layers * shape.layer_parameters + 2 * shape.head_parameters for name, shape in SHAPES.items()
    }
    assert parameters["llama-3-8b"] == pytest.approx(8.03e9, rel=0.001)
    assert parameters["qwen2.5-7b"] == pytest.approx(7.62e9, rel=0.001)
    assert parameters["llama-3-70b"] == pytest.approx(70.55e9, rel=0.001)


def test_speedup() -> None:
    # 8 tokens for 7 drafts of half a step and a verification of one and a half.
    assert report.speedup(8.0, 8, 0.5, 1.5) == pytest.approx(1.6)


def test_missing_layers_are_extrapolated() -> None:
    shape = SHAPES["llama-3-8b"]
    steps = {"dense": Timing("dense", 1100, 11.0), "coarse 0.5": Timing("coarse 0.5", 600, 6.6)}
    empty = {"dense": Timing("dense", 100, 1.0), "coarse 0.5": Timing("coarse 0.5", 100, 1.0)}
    dense, coarse = report.step_rows(steps, empty, shape, 16, bandwidth=100.0)
    assert dense["milliseconds"] == pytest.approx(21_000.0)
    assert dense["part_of_copy_bandwidth"] == pytest.approx(1.0)
    assert coarse["cost"] == pytest.approx(12.2 / 21)
    assert coarse["byte_share"] == pytest.approx(1100 / 2100)
    assert coarse["cost_over_byte_share"] == pytest.approx(12.2 / 11)
    whole, _ = report.step_rows(steps, {}, shape, 32, bandwidth=100.0)
    assert whole["milliseconds"] == pytest.approx(11_000.0)


def test_layers_that_fit() -> None:
    shape = SHAPES["llama-3-70b"]
    assert run.layers_that_fit(shape, 200 << 30) == 80
    layers = run.layers_that_fit(shape, 80 << 30)
    used = 2 * layers * shape.layer_parameters + 4 * shape.head_parameters + run.RESERVED_BYTES
    assert used <= 80 << 30 < used + 2 * shape.layer_parameters
    with pytest.raises(SystemExit, match="not even one layer"):
        run.layers_that_fit(shape, 8 << 30)
