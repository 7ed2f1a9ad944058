"""Correctness of the scenario on CPU tensors: the schedule in every order that its waits permit, the draft, the figures."""

from __future__ import annotations

import io
import itertools
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.offload import draft, report
from benchmarks.gpu.offload.layers import dense, fill, layer_elements, run_layer, weights_in
from benchmarks.gpu.offload.queues import Choose, SimulatedQueues, prefer, shuffled
from benchmarks.gpu.offload.stream import LayerStream, State
from benchmarks.gpu.shapes import TINY_OFFLOAD, Shape

BUFFER_COUNTS = (1, 2, 3, 4)
LAYER_COUNTS = (1, 2, 5, 8, 9)
NUM_PASSES = 2
"""Passes behind each other: the second one's first copies must leave the first one's last layers alone.

Each has a model of its own. With one for both, a buffer could hold the right layer though nobody waited for it."""

Models = list[list[torch.Tensor]]
"""Layers in the host's memory, for every pass."""

SEEDS = range(5)
CPU = torch.device("cpu")


@dataclass
class Times:
    """Stands for a timed arm."""

    name: str
    num_bytes: int
    median: float
    spread: float = 0.0


def run_checks() -> None:
    """Runs all checks.

    Raises:
        AssertionError: If something is computed wrongly.
    """
    torch.manual_seed(0)
    for check in (check_streamed_pass, check_every_wait_matters, check_layout, check_draft, check_tables):
        check()
        print(f"{check.__name__.replace('_', ' ')}: ok")


def orders() -> Iterator[tuple[str, Choose]]:
    """Orders of copies and layers: the two extremes, and random ones in between."""
    yield "copies as early as they may", prefer("copy")
    yield "layers as early as they may", prefer("compute")
    for seed in SEEDS:
        yield f"shuffled {seed}", shuffled(seed)


def check_streamed_pass() -> None:
    """Streamed passes equal resident layers to the last bit, whatever the order, buffers and layers."""
    for num_layers in LAYER_COUNTS:
        shape = replace(TINY_OFFLOAD, num_layers=num_layers)
        models, inputs = random_models(shape), torch.randn(3, shape.hidden_size)
        expected = resident_passes(shape, models, inputs)
        for num_buffers in BUFFER_COUNTS:
            for name, choose in orders():
                actual = streamed_passes(shape, models, inputs, num_buffers, SimulatedQueues(choose))
                assert torch.equal(actual, expected), (num_layers, num_buffers, name)


def check_every_wait_matters() -> None:
    """Without any one of its waits the schedule computes something else in some order, so the check above sees them all."""
    shape = TINY_OFFLOAD
    models, inputs = random_models(shape), torch.randn(3, shape.hidden_size)
    expected = resident_passes(shape, models, inputs)
    for num_buffers in BUFFER_COUNTS:
        queues = SimulatedQueues(prefer("copy"))
        streamed_passes(shape, models, inputs, num_buffers, queues)
        # The first wait of all is for what came before the first pass: nothing.
        for wait in range(1, queues.num_waits):
            assert is_noticed(shape, models, inputs, num_buffers, {wait}, expected), (num_buffers, wait)


def is_noticed(
    shape: Shape,
    models: Models,
    inputs: torch.Tensor,
    num_buffers: int,
    dropped_waits: Collection[int],
    expected: torch.Tensor,
) -> bool:
    """Whether some order shows that waits are missing.

    Args:
        shape: Sizes.
        models: Layers.
        inputs: ``[tokens, hidden]``.
        num_buffers: Layers on the device at a time.
        dropped_waits: Numbers of the missing waits.
        expected: What the passes should compute.
    """
    return any(
        not torch.equal(
            streamed_passes(shape, models, inputs, num_buffers, SimulatedQueues(choose, dropped_waits)), expected
        )
        for _, choose in orders()
    )


def check_layout() -> None:
    """Matrices are as large as the model's, do not overlap, and a layer is one stretch of memory."""
    shape = TINY_OFFLOAD
    memory = torch.zeros(layer_elements(shape))
    weights = weights_in(shape, memory)
    assert sum(weight.numel() for weight in weights) == shape.layer_parameters
    for weight in weights:
        weight += 1
    assert memory.max() == 1
    assert memory.sum() == shape.layer_parameters
    stream = LayerStream(shape, [memory], [torch.zeros_like(memory)], SimulatedQueues(prefer("copy")))
    assert stream.num_bytes == shape.num_layers * memory.nbytes


def check_draft() -> None:
    """The int4 kernel multiplies rightly, and both kinds of drafts read the bytes that the memory check counts."""
    assert draft.int4_error(CPU, torch.float32) < 1e-5
    shape, inputs = TINY_OFFLOAD, torch.randn(1, TINY_OFFLOAD.hidden_size).bfloat16()
    for kind in (draft.DraftKind("int4"), draft.DraftKind("stand-in")):
        model = draft.Draft(shape, kind, CPU, torch.bfloat16)
        assert model.num_bytes == draft.draft_bytes(shape), kind
        assert model.step(inputs).shape == (1,)


def check_tables() -> None:
    """Tables hold together, with seconds made up: copies take 2, layers 1, half of which is hidden, a draft step .1."""
    arms = {"copy": Times("copy", 40, 2.0), "draft": Times("draft", 10, 0.1)}
    for count in (1, 64):
        arms[f"compute {count}"] = Times("compute", 44, 1.0)
        arms[f"pass {count}"] = Times("pass", 40, 2.5)
    result: dict[str, Any] = report.summary(arms, (1, 64))
    assert [row["overlap"] for row in result["measured"]["passes"]] == [0.5, 0.5]
    for row in result["implied"][1:]:
        accepted = (1 - row["acceptance"] ** (row["drafted"] + 1)) / (1 - row["acceptance"])
        assert abs(row["tokens_per_second"] - accepted / (0.1 * row["drafted"] + 2.0)) < 1e-9
        assert abs(row["tokens_per_second_of_measured_pass"] - accepted / (0.1 * row["drafted"] + 2.5)) < 1e-9
    model = {
        "model": "tiny",
        "shape": {"num_layers": 5},
        "buffers": 2,
        "distinct_layers": 4,
        "draft_weights": {"name": "stand-in", "reason": "No kernel"},
    }
    with redirect_stdout(io.StringIO()) as printed:
        report.print_model({**model, **result})
    assert f"speed-up {result['paper']['speedup']}" in printed.getvalue().splitlines()[-1]


def random_models(shape: Shape) -> Models:
    """Different weights for every layer of every pass."""
    models = [[torch.zeros(layer_elements(shape)) for _ in range(shape.num_layers)] for _ in range(NUM_PASSES)]
    for memory in itertools.chain(*models):
        fill(shape, memory)
    return models


def resident_passes(shape: Shape, models: Models, inputs: torch.Tensor) -> torch.Tensor:
    """What a pass of each model behind the other computes where all layers are at hand.

    Args:
        shape: Sizes.
        models: Layers.
        inputs: ``[tokens, hidden]``.
    """
    hidden = inputs
    for memory in itertools.chain(*models):
        hidden = run_layer(shape, dense(shape, memory), hidden)
    return hidden


def streamed_passes(
    shape: Shape, models: Models, inputs: torch.Tensor, num_buffers: int, queues: SimulatedQueues
) -> torch.Tensor:
    """The same streamed through buffers that the passes share, submitted without waiting for the first one's end.

    Args:
        shape: Sizes.
        models: Layers.
        inputs: ``[tokens, hidden]``.
        num_buffers: Layers on the device at a time.
        queues: Where copies and layers run.
    """
    buffers, state = [torch.zeros(layer_elements(shape)) for _ in range(num_buffers)], State(inputs)
    for host in models:
        LayerStream(shape, host, buffers, queues).enqueue(state)
    queues.finish()
    return state.hidden
