"""Builds the scenario and times its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.measure import Arm
from benchmarks.gpu.offload import memory, report
from benchmarks.gpu.offload.draft import Draft, choose_kind, graph_or_plain
from benchmarks.gpu.offload.layers import fill, layer_elements
from benchmarks.gpu.offload.queues import Queues
from benchmarks.gpu.offload.stream import LayerStream
from benchmarks.gpu.shapes import Shape

Clock = Callable[[Arm], float]
"""Runs an arm and returns the seconds of one call."""

DRAFT_STEPS = 5
"""Draft steps per sample: one takes no longer than a few copies of a matrix."""

CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        shape: Sizes.
        num_buffers: Layers that are on the GPU at a time.
        num_distinct: Layers that are in the host's memory; the others are the same ones again.
        token_counts: Tokens that a pass verifies, ascending.
        num_samples: Of every time.
    """

    shape: Shape
    num_buffers: int
    num_distinct: int
    token_counts: Sequence[int]
    num_samples: int


def measure(
    setting: Setting, device: torch.device, dtype: torch.dtype, queues: Queues, clock: Clock | None = None
) -> dict[str, Any]:
    """Measures one model.

    Args:
        setting: What.
        device: Where drafts and layers run.
        dtype: Of the streamed weights.
        queues: Of that device.
        clock: `cuda_seconds` unless given.

    Returns:
        Everything that goes into tables and JSON; see `report.summary`.

    Raises:
        RuntimeError: If a streamed pass computes something else than the same layers one by one.
    """
    # The draft comes first: packing its weights takes memory for a moment that buffers could have by then.
    kind = choose_kind(device, dtype)
    draft = Draft(setting.shape, kind, device, dtype)
    stream = build_stream(setting, device, dtype, queues)
    check_pass(stream, device, dtype)
    head = torch.empty(setting.shape.vocab_size, setting.shape.hidden_size, device=device, dtype=dtype).normal_()
    arms = build_arms(setting, stream, draft, head)
    time_arms(arms, setting.num_samples, clock or cuda_seconds)
    return {
        "model": setting.shape.name,
        "shape": asdict(setting.shape),
        "buffers": setting.num_buffers,
        "distinct_layers": setting.num_distinct,
        "samples": setting.num_samples,
        "draft_weights": asdict(kind),
        **report.summary({arm.name: arm for arm in arms}, setting.token_counts),
    }


def build_stream(setting: Setting, device: torch.device, dtype: torch.dtype, queues: Queues) -> LayerStream:
    """Random layers in the host's memory, pinned beside a GPU, and buffers on the device."""
    elements, pinned = layer_elements(setting.shape), device.type == "cuda"
    buffers = [torch.zeros(elements, device=device, dtype=dtype) for _ in range(setting.num_buffers)]
    host = []
    for _ in range(setting.num_distinct):
        # The GPU draws random numbers many times faster than the host does.
        fill(setting.shape, buffers[0])
        host.append(torch.empty(elements, dtype=dtype, pin_memory=pinned).copy_(buffers[0]))
    return LayerStream(setting.shape, host, buffers, queues)


def check_pass(stream: LayerStream, device: torch.device, dtype: torch.dtype) -> None:
    """Compares a streamed pass with the same layers one by one, to the last bit.

    Args:
        stream: With more distinct layers than buffers, or a buffer that kept its last layer would go unnoticed.
        device: Of the layers.
        dtype: Of the layers.

    Raises:
        RuntimeError: If they differ.
    """
    inputs = torch.randn(CHECKED_TOKENS, stream.shape.hidden_size, device=device).to(dtype)
    if not torch.equal(stream.run(inputs), stream.run_in_turn(inputs)):
        raise RuntimeError(
            "A streamed pass differs from its layers one by one: a buffer was read or written too early."
        )


def build_arms(setting: Setting, stream: LayerStream, draft: Draft, head: torch.Tensor) -> list[Arm]:
    """What is timed: ``copy``, ``draft``, and for every number of tokens ``compute N`` and ``pass N``.

    Args:
        setting: Numbers of tokens.
        stream: The target's layers.
        draft: The draft.
        head: The target's output head, ``[vocab, hidden]``, resident.
    """

    def after(layers: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: F.linear(layers(inputs), head).argmax(dim=-1)

    token = torch.randn(1, stream.shape.hidden_size, device=head.device).to(head.dtype)
    step = graph_or_plain(lambda: draft.step(token), head.device)
    arms = [Arm("copy", stream.num_bytes, stream.copy_only), Arm("draft", draft.num_bytes, step)]
    for count in setting.token_counts:
        inputs = torch.randn(count, stream.shape.hidden_size, device=head.device).to(head.dtype)
        read = stream.num_bytes + head.nbytes
        arms.append(Arm(f"compute {count}", read, after(stream.compute_only, inputs)))
        arms.append(Arm(f"pass {count}", stream.num_bytes, after(stream.run, inputs)))
    return arms


def time_arms(arms: Sequence[Arm], num_samples: int, clock: Clock) -> None:
    """Takes samples of all arms in turn, so that a change of clocks hits all of them; a first round is not counted."""
    for sample in range(num_samples + 1):
        for arm in arms:
            seconds = clock(arm)
            if sample:
                arm.seconds.append(seconds)


def cuda_seconds(arm: Arm) -> float:
    """Seconds of one call, between events on the current stream."""
    count = DRAFT_STEPS if arm.name == "draft" else 1
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        arm.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def require_memory(setting: Setting, free_gpu: int, free_host: int) -> None:
    """Refuses what does not fit, before anything is allocated.

    Args:
        setting: What will be measured.
        free_gpu: Bytes.
        free_host: Bytes.

    Raises:
        memory.MemoryTooSmallError: With what is needed and what is free.
    """
    shape = setting.shape
    memory.require(shape, "GPU", memory.gpu_needs(shape, setting.num_buffers), free_gpu)
    memory.require(shape, "host", memory.host_needs(shape, setting.num_distinct), free_host)
