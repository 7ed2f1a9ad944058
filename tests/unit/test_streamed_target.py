"""The target's linear layers on streamed panels: the numbers of panels in memory, in whatever order a model calls them."""

from __future__ import annotations

import logging
import os
import random
import shutil

import pytest
import torch

from vllm_sirius.kernels.cpu.panel_linear import has_panels, panel_linear
from vllm_sirius.offload.stream import StreamStatistics, WeightStream
from vllm_sirius.offload.weight_file import WeightFile, WeightFileWriter
from vllm_sirius.target.stream_report import INTERVAL_SECONDS, StreamReport
from vllm_sirius.target.streamed import StreamedMatrix, StreamedTarget
from vllm_sirius.weights.panels import Panels, panels_shape

HAS_COMPILER = bool(os.environ.get("CXX")) or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
pytestmark = [
    pytest.mark.usefixtures("fresh_input", "one_or_two_threads"),
    pytest.mark.skipif(not HAS_COMPILER or not has_panels(), reason="needs a C++ compiler and AVX-512"),
]
GROUPS, MATRICES = 5, 3


class Model:
    """Matrices of odd sizes in memory and in a file."""

    def __init__(self, folder):
        self.weights = [
            [torch.randn(random.randint(1, 70), random.randint(1, 70)).bfloat16() for _ in range(MATRICES)]
            for _ in range(GROUPS)
        ]
        self.packed = [Panels.pack(weight) for group in self.weights for weight in group]
        names = [[f"{i}.{j}" for j in range(MATRICES)] for i in range(GROUPS)]
        sizes = [
            {name: self.packed[i * MATRICES + j].weights.nbytes for j, name in enumerate(group)}
            for i, group in enumerate(names)
        ]
        writer = WeightFileWriter(folder / "model.weights", sizes, 0)
        for name, packed in zip([name for group in names for name in group], self.packed, strict=True):
            writer.write(name, packed.weights)
        writer.finish({})
        self.file = WeightFile(folder / "model.weights")
        matrices = []
        for number, group in enumerate(names):
            start = 0
            for j, name in enumerate(group):
                num_outputs, width = self.weights[number][j].shape
                matrices.append(StreamedMatrix(number, start, panels_shape(num_outputs, width), num_outputs))
                start += self.file.entries[name].num_bytes
        self.target = StreamedTarget(matrices)
        self.stream = WeightStream(self.file.path, [self.file.group(i) for i in range(GROUPS)])
        self.target.open(self.stream)

    def check(self, number):
        packed = self.packed[number]
        inputs = torch.randn(random.randint(1, 20), packed.width).bfloat16()
        bias = torch.randn(packed.num_outputs).bfloat16() if random.random() < 0.5 else None
        expected = panel_linear(inputs, packed.weights, packed.num_outputs, bias)
        assert torch.equal(self.target.run(number, inputs, bias), expected)


@pytest.fixture
def model(tmp_path):
    made = Model(tmp_path)
    yield made
    made.target.close()


def test_passes_in_the_order_of_the_file(model):
    for _ in range(3):
        for number in range(GROUPS * MATRICES):
            model.check(number)
    found = model.target.statistics()
    assert found.num_rounds == 3
    # Nothing was read twice: three rounds, and what is read ahead.
    total = sum(model.file.group(i).num_bytes for i in range(GROUPS))
    assert found.num_bytes <= 3 * total + model.target.num_bytes


def test_another_order_within_a_group_is_learnt(model):
    """The first pass is right too, if slow: a group whose last matrix in the file comes early is read again."""
    order = [MATRICES * group + place for group in range(GROUPS) for place in (2, 0, 1)]
    for number in order:
        model.check(number)
    first = model.target.statistics()
    for _ in range(3):
        for number in order:
            model.check(number)
    total = sum(model.file.group(i).num_bytes for i in range(GROUPS))
    assert model.target.statistics().num_bytes - first.num_bytes <= 3 * total + model.target.num_bytes


def test_matrices_in_any_order_are_right(model):
    for number in random.choices(range(GROUPS * MATRICES), k=40):
        model.check(number)


def test_a_pass_that_was_left_does_not_spoil_the_next(model):
    for stop in random.sample(range(1, GROUPS * MATRICES), 4):
        for number in range(stop):
            model.check(number)


def test_the_outputs_of_pieces_are_put_together(model):
    """An lm_head in pieces, whose last one is not full."""
    width, sizes = 33, (32, 48, 7)
    weight = torch.randn(sum(sizes), width).bfloat16()
    packed = [Panels.pack(part) for part in weight.split(sizes)]
    path = model.file.path.with_name("head.weights")
    writer = WeightFileWriter(path, [{str(i): part.weights.nbytes} for i, part in enumerate(packed)], 0)
    for number, part in enumerate(packed):
        writer.write(str(number), part.weights)
    writer.finish({})
    file = WeightFile(path)
    target = StreamedTarget([StreamedMatrix(i, 0, tuple(p.weights.shape), p.num_outputs) for i, p in enumerate(packed)])
    target.open(WeightStream(path, [file.group(i) for i in range(len(packed))]))
    inputs, bias, whole = torch.randn(2, 5, width).bfloat16(), torch.randn(sum(sizes)).bfloat16(), Panels.pack(weight)
    for added in (None, bias):
        expected = panel_linear(inputs, whole.weights, whole.num_outputs, added)
        assert torch.equal(target.run_pieces(range(len(sizes)), inputs, added), expected)
    target.close()


def test_what_streaming_costs_is_said_once_in_a_while(model, caplog):
    now = 0.0
    report = StreamReport(model.target, lambda: now)
    caplog.set_level(logging.INFO, logger="vllm.sirius")
    for number in range(GROUPS * MATRICES):
        model.check(number)
    report.emitted(7)
    assert not caplog.messages
    now = INTERVAL_SECONDS
    report.emitted(3)
    (said,) = caplog.messages
    assert said.startswith("Sirius: 10 tokens in 60 s by 1 passes, which streamed 0.00 GB at ")
    assert "MB a token" in said
    now = 2 * INTERVAL_SECONDS
    report.emitted(1)
    assert len(caplog.messages) == 1  # no pass since
    found = report.as_dict()
    assert (found["passes"], found["tokens"]) == (1, 11)
    assert found["bytes_streamed"] > 0


def test_a_disk_that_becomes_slow_is_said_once(caplog):
    """By made-up statistics: rates of 2, 1.2, .9, .8, 1.9 and .7 GB/s, of which the third and the last are news."""
    now, read = 0.0, 0

    class Target:
        def statistics(self):
            return StreamStatistics(read, now / 2, 0.0, int(now))

    report = StreamReport(Target(), lambda: now)
    warned = []
    for rate in (2.0, 1.2, 0.9, 0.8, 1.9, 0.7):
        now += INTERVAL_SECONDS
        read += int(rate * 1e9 * INTERVAL_SECONDS / 2)
        report.emitted(5)
        warned.append(len([record for record in caplog.records if record.levelno == logging.WARNING]))
    assert warned == [0, 0, 1, 1, 1, 2]
    assert "gave 0.90 GB/s in the last 60 s, after 2.00 GB/s before" in caplog.text
