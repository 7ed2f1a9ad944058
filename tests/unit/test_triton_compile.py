"""The Triton kernels compile for the GPUs that they are meant for. Needs no GPU: Triton brings the compilers."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.gpu import glue  # noqa: E402
from vllm_sirius.kernels.triton import (  # noqa: E402
    acceptance,
    kernels,
    projection,
    selection,
    statistics,
    streaming,
    tuning,
)

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that a program may have, by compute capability."""

POINTERS = {
    "accepted": "*i1",
    "activated": "*fp32",
    "activation": "*bf16",
    "best": "*fp32",
    "count": "*i32",
    "delta": "*bf16",
    "cu_num_logits": "*i32",
    "down_rows": "*bf16",
    "draft_token_ids": "*i64",
    "energy": "*fp32",
    "gate": "*bf16",
    "gate_up": "*bf16",
    "hidden": "*bf16",
    "indices": "*i32",
    "inputs": "*bf16",
    "keys": "*bf16",
    "logits": "*bf16",
    "norms": "*fp32",
    "num_sampled": "*i32",
    "output": "*bf16",
    "own_token_ids": "*i64",
    "partial": "*fp32",
    "pending": "*bf16",
    "pending_row": "*i32",
    "place": "*i64",
    "positions": "*i64",
    "qkv": "*bf16",
    "queries": "*bf16",
    "residual": "*bf16",
    "sampled": "*i64",
    "token_slot": "*i32",
    "token_weight": "*fp32",
    "tops": "*fp32",
    "up": "*bf16",
    "values": "*bf16",
    "weight": "*bf16",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(capability: int, kernel: Any, constants: dict[str, Any], warps: int = 4, stages: int = 1) -> str:
    """Compiles a kernel for aligned pointers and sizes that 16 divides; returns its PTX."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        kind = "fp32" if name in ("epsilon", "scale", "theta") else POINTERS.get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and name != "num_tokens" and kind != "fp32":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    ptx: str = compiled.asm["ptx"]
    return ptx


def compile_tiles(capability: int, kernel: Any, tiles: tuning.Tiles, tokens: int, **constants: Any) -> str:
    """Compiles a projection with given tiles."""
    options = {**kernels._sizes(tiles, kernels._block(tiles, tokens)), **constants}
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    return compile_for(capability, kernel, options, warps, stages)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("tokens", [1, 16])
def test_projections_compile(capability: int, tokens: int) -> None:
    rows = tuning.row_candidates(tokens, torch.bfloat16, torch.device("cpu"))[0]
    down = tuning.down_candidates(tokens, torch.bfloat16, torch.device("cpu"))[0]
    for kernel, tiles, constants in (
        (projection.gate_up_kernel, rows, {"activation": "silu", "gate_first": True}),
        (projection.gate_kernel, rows, {"activation": "gelu"}),
        (projection.up_kernel, rows, {}),
        (projection.down_kernel, down, {"counted": True}),
    ):
        ptx = compile_tiles(capability, kernel, tiles, tokens, **constants)
        # Weights are read in pieces of 16 bytes, the widest there is, and multiplied by tensor cores for many tokens.
        assert "v4.b32" in ptx or "cp.async.cg" in ptx
        assert ("mma.sync" in ptx) == tiles.tensor_cores


def compile_stream(capability: int, tiles: tuning.Tiles, kernel: Any, **constants: Any) -> str:
    """Compiles a stream with given tiles."""
    sizes = {"block_rows": tiles.rows, "block_columns": tiles.columns, "stages": tiles.stages}
    return compile_for(capability, kernel, {**constants, **sizes}, tiles.warps, tiles.stages)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_streams_compile(capability: int) -> None:
    tiles = tuning.stream_candidates(4096, torch.bfloat16, torch.device("cpu"))[0]
    for kernel, constants in (
        (streaming.stream_coarse_kernel, {"activation": "silu", "gate_first": True}),
        (streaming.stream_fine_kernel, {}),
    ):
        assert "v4.b32" in compile_stream(capability, tiles, kernel, **constants)
        # Sizes of one, which Triton makes constants.
        ones = {name: 1 for name in ("num_kept", "num_neurons", "hidden_size") if name in kernel.arg_names}
        compile_stream(capability, tiles, kernel, **constants, **ones)
    compile_for(capability, streaming.sum_programs_kernel, {"block_programs": 64, "block_columns": 16})


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_other_kernels_compile(capability: int) -> None:
    compile_for(capability, projection.sum_parts_kernel, {"num_parts": 32, "block_outputs": 512})
    compile_for(capability, selection.keep_largest_kernel, {"list_kept": True, "block_neurons": 16384}, warps=8)
    compile_for(capability, selection.list_kept_kernel, {"block_neurons": 16384}, warps=8)
    compile_for(capability, statistics.square_norm_kernel, {"block_neurons": 2048})
    for block_tokens in (16, 64):
        constants = {"block_tokens": block_tokens, "block_neurons": 64}
        compile_for(capability, statistics.add_shares_kernel, constants)
    compile_for(capability, acceptance.pick_tokens_kernel, {"block": 16}, warps=1)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_of_the_benchmark_compile(capability: int) -> None:
    compile_for(capability, glue._add_rms_norm_kernel, {"has_delta": True, "block": 4096}, warps=8)
    compile_for(capability, glue._silu_and_mul_kernel, {"block": 1024})
    compile_for(capability, glue._rotate_and_store_kernel, {"half": 64}, warps=1)
    tiles = {"head_size": 128, "block_keys": 64}
    for rows in (16, 64):
        compile_for(capability, glue._attend_kernel, {**tiles, "block_rows": rows})
    compile_for(capability, glue._merge_parts_kernel, {"head_size": 128, "block_parts": 16})
    compile_for(capability, glue._argmax_kernel, {"block": 1024})
    # A single token, which Triton makes a constant.
    compile_for(capability, glue._rotate_and_store_kernel, {"half": 64, "tokens": 1}, warps=1)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("tokens", [1, 16, 32])
def test_every_choice_of_tiles_compiles(capability: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_shared_memory_limit", lambda device: SHARED_MEMORY[capability])
    device, dtype = torch.device("cpu"), torch.bfloat16
    for tiles in tuning.row_candidates(tokens, dtype, device):
        compile_tiles(capability, projection.gate_up_kernel, tiles, tokens, activation="silu", gate_first=True)
    for tiles in tuning.down_candidates(tokens, dtype, device):
        compile_tiles(capability, projection.down_kernel, tiles, tokens, counted=False)
    for tiles in tuning.stream_candidates(4096, dtype, device):
        compile_stream(capability, tiles, streaming.stream_coarse_kernel, activation="silu", gate_first=True)
