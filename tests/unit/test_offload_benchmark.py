"""The GPU benchmark with streamed layers: its schedule, memory and figures, as far as a machine without a GPU can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.offload import __main__ as program
from benchmarks.gpu.offload import check, draft, layers, memory, report
from benchmarks.gpu.offload.layers import layer_elements
from benchmarks.gpu.offload.queues import CudaQueues, SimulatedQueues, prefer
from benchmarks.gpu.offload.stream import LayerStream
from benchmarks.gpu.shapes import OFFLOAD_SHAPES, TINY_OFFLOAD, Shape
from vllm_sirius.offload import available

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.offload", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_check_passes() -> None:
    result = run_program("--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(": ok") == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_plainly() -> None:
    result = run_program("--shape", "32b")
    assert result.returncode == 1
    assert result.stderr == "No GPU: this machine can only run the correctness check, --device cpu.\n"


def test_scenario_needs_no_vllm() -> None:
    names = "__main__, check, draft, layers, measure, memory, queues, report, stream"
    imported = (
        "import sys\n"
        f"from benchmarks.gpu.offload import {names}\n"
        "from vllm_sirius.measuring import machine\n"
        "from vllm_sirius.offload import available\n"
        "assert not any(name.split('.')[0] == 'vllm' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", imported], cwd=ROOT, check=True, timeout=300)


@pytest.mark.usefixtures("fresh_input", "one_thread")
@pytest.mark.parametrize(("queue", "order"), [("copy", "copy"), ("compute", "compute")])
def test_a_queue_that_never_waits_is_noticed(queue: str, order: str) -> None:
    class Impatient(SimulatedQueues):
        def __init__(self) -> None:
            super().__init__(prefer(order))
            getattr(self, queue).wait = lambda mark: None

    shape = replace(TINY_OFFLOAD, num_layers=7)
    models, inputs = check.random_models(shape), torch.randn(3, shape.hidden_size)
    expected = check.resident_passes(shape, models, inputs)
    assert not torch.equal(check.streamed_passes(shape, models, inputs, 2, Impatient()), expected)
    patient = SimulatedQueues(prefer(order))
    assert torch.equal(check.streamed_passes(shape, models, inputs, 2, patient), expected)


def test_copies_run_ahead_by_the_number_of_buffers() -> None:
    order: list[str] = []

    class Recorded(SimulatedQueues):
        def __init__(self) -> None:
            super().__init__(prefer("copy"))
            for name in ("copy", "compute"):
                queue = getattr(self, name)
                queue.submit = lambda work, queue=queue, name=name: queue.pending.append(
                    ("work", lambda: (order.append(name), work()))
                )

    layer = torch.zeros(layer_elements(TINY_OFFLOAD))
    buffers = [layer.clone() for _ in range(3)]
    LayerStream(TINY_OFFLOAD, [layer], buffers, Recorded()).run(torch.randn(1, TINY_OFFLOAD.hidden_size))
    copies = ["copy", "copy", "copy", "compute", "copy", "compute", "copy", "compute", "compute", "compute"]
    assert order == copies


def test_queues_that_wait_for_each_other_are_an_error() -> None:
    queues = SimulatedQueues(prefer("copy"))
    queues.copy.wait(object())
    queues.copy.submit(lambda: None)
    with pytest.raises(RuntimeError, match="wait for each other"):
        queues.finish()


def measured_on_cpu(queues: SimulatedQueues) -> dict[str, Any]:
    pytest.importorskip("triton")
    from benchmarks.gpu.offload import measure

    def clock(arm: Any) -> float:
        arm.replay()
        return 1e-9 * arm.num_bytes

    setting = measure.Setting(TINY_OFFLOAD, 2, 3, (1, 4), 2)
    with torch.inference_mode():
        return measure.measure(setting, CPU, torch.bfloat16, queues, clock)


@pytest.mark.usefixtures("one_thread")
def test_measurements_hold_together(capsys: pytest.CaptureFixture[str]) -> None:
    result = measured_on_cpu(SimulatedQueues(prefer("compute")))
    measured = result["measured"]
    streamed = 2 * TINY_OFFLOAD.num_layers * TINY_OFFLOAD.layer_parameters
    assert measured["streamed_gigabytes"] == pytest.approx(streamed / 1e9)
    assert measured["copy_gigabytes_per_second"] == pytest.approx(1.0)
    assert measured["draft_gigabytes"] == pytest.approx(draft.draft_bytes(TINY_OFFLOAD) / 1e9)
    assert [row["tokens"] for row in measured["passes"]] == [1, 4]
    assert result["draft_weights"] == {"name": "int4", "reason": ""}
    assert json.loads(json.dumps(result))["measured"] == measured
    report.print_model(result)
    assert "3 distinct layers lie in pinned host memory" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_a_pass_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    queues = SimulatedQueues(prefer("compute"))
    monkeypatch.setattr(queues.compute, "wait", lambda mark: None)
    with pytest.raises(RuntimeError, match="read or written too early"):
        measured_on_cpu(queues)


@pytest.mark.usefixtures("one_thread")
def test_stand_in_reads_what_int4_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> float:
        raise NotImplementedError("Could not run it with arguments from this backend.\nA long list follows.")

    monkeypatch.setattr(draft, "int4_error", refuse)
    result = measured_on_cpu(SimulatedQueues(prefer("compute")))
    assert result["draft_weights"]["name"] == "stand-in"
    assert result["draft_weights"]["reason"].endswith("Could not run it with arguments from this backend.")
    assert result["measured"]["draft_gigabytes"] == pytest.approx(draft.draft_bytes(TINY_OFFLOAD) / 1e9)


class FakeStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name} waits for {event.recorded}")


class FakeEvent:
    recorded = ""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing

    def record(self, stream: FakeStream | None = None) -> None:
        if stream:
            stream.log.append(f"{stream.name} records")
            self.recorded = f"{stream.name} {stream.log.count(f'{stream.name} records')}"

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.timed
        assert end.timed
        return 500.0


@pytest.fixture
def cuda_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Streams and events that only say what is asked of them."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream(log, "copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream(log, "layers"))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "stream", on)
    return log


def test_streams_of_a_gpu_are_asked_to_wait_both_ways(cuda_log: list[str]) -> None:
    shape = replace(TINY_OFFLOAD, num_layers=2)
    layer = torch.zeros(layer_elements(shape))
    LayerStream(shape, [layer], [layer.clone()], CudaQueues()).run(torch.randn(1, shape.hidden_size))
    one_layer = ["on copies", "copies records", "layers waits for copies {0}", "on layers", "layers records"]
    expected = ["layers records", "copies waits for layers 1", *one_layer, "copies waits for layers 2", *one_layer]
    copies = iter("12")
    assert cuda_log == [line.format(next(copies)) if "{0}" in line else line for line in expected]


@pytest.mark.usefixtures("cuda_log")
def test_seconds_of_one_call() -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.measure import Arm
    from benchmarks.gpu.offload import measure

    calls: list[str] = []
    assert measure.cuda_seconds(Arm("copy", 1, lambda: calls.append("copy"))) == 0.5
    assert measure.cuda_seconds(Arm("draft", 1, lambda: calls.append("draft"))) == 0.5 / measure.DRAFT_STEPS
    assert calls == ["copy"] + ["draft"] * measure.DRAFT_STEPS


@pytest.mark.usefixtures("cuda_log")
def test_program_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = measured_on_cpu(SimulatedQueues(prefer("compute")))
    from benchmarks.gpu import run
    from benchmarks.gpu.offload import measure

    free = [47 * 10**9, 48 * 10**9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: tuple(free))
    monkeypatch.setattr(available, "available_bytes", lambda: 16 * 10**9)
    monkeypatch.setattr(run, "provenance", lambda: {"gpu": "a GPU", "torch": "2"})
    monkeypatch.setattr(measure, "measure", lambda *arguments: result)
    output = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["offload", "--shape", "70b", "--output", str(output)])
    program.main()
    written = json.loads(output.read_text())
    assert written["models"][0]["implied"] == result["implied"]
    assert {"gpu", "cpu", "torch"} <= set(written)
    assert "The paper, measured, 70B on an L40, lossy" in capsys.readouterr().out
    free[0] = 24 * 10**9
    with pytest.raises(SystemExit, match=r"llama-3-70b needs 45\.7 GB of GPU memory"):
        program.main()


def test_wrong_int4_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "int4_error", lambda device, dtype: 0.5)
    kind = draft.choose_kind(CPU, torch.bfloat16)
    assert (kind.name, kind.reason) == ("stand-in", "PyTorch's int4 kernel is off by 50.0% here")


def test_shapes_have_the_parameters_of_their_models() -> None:
    parameters = {
        name: shape.num_layers * shape.layer_parameters + 2 * shape.head_parameters
        for name, shape in OFFLOAD_SHAPES.items()
    }
    assert parameters["32b"] == pytest.approx(32.76e9, rel=0.001)
    assert parameters["70b"] == pytest.approx(70.55e9, rel=0.001)
    for shape in OFFLOAD_SHAPES.values():
        assert layer_elements(shape) == shape.layer_parameters
        whole = 2 * (shape.num_layers * shape.layer_parameters + shape.head_parameters)
        assert draft.draft_bytes(shape) / whole == pytest.approx(0.28, abs=0.002)


@pytest.mark.parametrize("shape", OFFLOAD_SHAPES.values(), ids=OFFLOAD_SHAPES)
def test_layers_of_real_sizes_fit_together_and_the_kernel(shape: Shape) -> None:
    matrices = layers.dense(shape, torch.empty(layer_elements(shape), device="meta"))
    hidden = torch.empty(64, shape.hidden_size, device="meta")
    assert layers.run_layer(shape, matrices, hidden).shape == hidden.shape
    for rows, columns in (*layers.matrix_sizes(shape), (shape.vocab_size, shape.hidden_size)):
        # Tiles of PyTorch's int4 kernel on a GPU, and rows of the stand-in.
        assert rows % 32 == 0
        assert columns % (16 * draft.INNER_TILES) == 0


def test_a_70b_fits_into_48_gigabytes_and_not_into_24() -> None:
    shape = OFFLOAD_SHAPES["70b"]
    needs = memory.gpu_needs(shape, 2)
    memory.require(shape, "GPU", needs, 47 * 10**9)
    sentence = (
        r"llama-3-70b needs 45\.\d GB of GPU memory \(the int4 draft 39\.1, .*2 buffers 3\.4.*\); 24\.0 GB are free\."
    )
    with pytest.raises(memory.MemoryTooSmallError, match=sentence):
        memory.require(shape, "GPU", needs, 24 * 10**9)
    memory.require(OFFLOAD_SHAPES["32b"], "GPU", memory.gpu_needs(OFFLOAD_SHAPES["32b"], 2), 24 * 10**9)
    host = r"of host memory \(4 pinned layers 8\.6, reserve 1\.1\); 4\.0 GB are free\."
    with pytest.raises(memory.MemoryTooSmallError, match=host):
        memory.require(shape, "host", memory.host_needs(shape, 4), 4 * 10**9)


def test_tokens_of_a_pass() -> None:
    assert report.accepted_tokens(0.5, 0) == 1
    assert report.accepted_tokens(0.5, 2) == pytest.approx(1.75)
    assert report.accepted_tokens(0.967, 31) == pytest.approx((1 - 0.967**32) / 0.033)


def test_implied_rate_of_a_70b_beside_25_gigabytes_a_second() -> None:
    seconds = {"copy": 5.48, "draft": 0.055, "compute 1": 0.2, "pass 1": 5.5, "compute 64": 0.2, "pass 64": 5.6}
    arms = {name: check.Times(name, 137_000_000_000, value) for name, value in seconds.items()}
    summary = report.summary(arms, (1, 64))
    row = report.implied_row(summary["measured"], 0.967, 31)
    assert row["tokens_per_second"] == pytest.approx(2.8, abs=0.1)
    best = [row["drafted"] for row in summary["implied"]]
    assert best == sorted(best)
    assert all(row["speedup"] > 10 for row in summary["implied"][1:])


@pytest.mark.parametrize(
    "arguments",
    [["--tokens", "65"], ["--tokens", "0"], ["--buffers", "0"], ["--samples", "1"], ["--buffers", "4"]],
)
def test_bad_command_lines_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.parse_arguments(arguments)
    assert "error: --" in capsys.readouterr().err
