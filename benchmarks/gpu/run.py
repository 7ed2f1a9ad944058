"""Measures draft and verification on a GPU: what a step costs, next to the bytes it reads.

    python -m benchmarks.gpu.run --output results.json
    python -m benchmarks.gpu.run --check          # correctness, on any machine

Needs PyTorch and Triton, not vLLM. Run it in the repository's root. See README.md beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESERVED_BYTES = 4 << 30
"""Memory that weights leave free, for graphs, temporary tensors and the second layout of a few layers."""

FFN_LAYERS = 4
"""Layers that FFNs alone run through: more bytes than any cache holds."""


def main() -> None:
    """Runs the checks or the measurements."""
    arguments = parse_arguments()
    if arguments.check:
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        from benchmarks.gpu.check import run_checks

        run_checks()
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("No GPU: this machine can only run the correctness check, --check.")
    from benchmarks.gpu import measure, report

    torch.manual_seed(0)
    bandwidth = measure.copy_bandwidth()
    result: dict[str, Any] = {**provenance(), "copy_bandwidth": bandwidth, "models": []}
    print(f"{result['gpu']}, copy {bandwidth / 1e9:.0f} GB/s, torch {result['torch']}, triton {result['triton']}")
    for name in arguments.models:
        result["models"].append(measure_model(name, arguments, bandwidth))
        report.print_model(result["models"][-1])
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure_model(name: str, arguments: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Measures one model.

    Args:
        name: One of `shapes.SHAPES`.
        arguments: From `parse_arguments`.
        bandwidth: Bytes per second of a copy.

    Returns:
        Everything that goes into tables and JSON.
    """
    import torch

    from benchmarks.gpu import measure, report
    from benchmarks.gpu.decoder import Decoder
    from benchmarks.gpu.shapes import SHAPES
    from vllm_sirius.kernels.triton.kernels import tuned_tiles

    shape, device = SHAPES[name], torch.device("cuda")
    torch.cuda.empty_cache()
    num_layers = arguments.layers or layers_that_fit(shape, torch.cuda.mem_get_info()[0])
    num_layers = min(num_layers, shape.num_layers)
    empty = Decoder(shape, 0, arguments.length, device)
    decoder = Decoder(shape, num_layers, arguments.length, device)
    measure.warm_up_drafts(decoder)
    steps = measure.time_steps(decoder, arguments.verify)
    bare = measure.time_steps(empty, arguments.verify) if num_layers < shape.num_layers else {}
    rows = report.step_rows(steps, bare, shape, num_layers, bandwidth)
    ffns = []
    for tokens in arguments.ffn_tokens:
        ffn_layers = min(FFN_LAYERS, num_layers)
        ffns += report.ffn_rows(measure.time_ffns(decoder, tokens, ffn_layers), ffn_layers, tokens, bandwidth)
    return {
        "model": name,
        "shape": asdict(shape),
        "layers": num_layers,
        "all_layers": shape.num_layers,
        "length": arguments.length,
        "steps": rows,
        "speedups": report.speedup_rows(rows),
        "ffns": ffns,
        "tiles": {str(key): asdict(tiles) for key, tiles in tuned_tiles().items()},
    }


def layers_that_fit(shape: Any, free_bytes: int) -> int:
    """Layers of a model, in 16 bits, that fit beside its head."""
    room = free_bytes - RESERVED_BYTES - 2 * 2 * shape.head_parameters
    layers = int(room // (2 * shape.layer_parameters))
    if layers < 1:
        sys.exit(f"{shape.name}: not even one layer fits into {free_bytes >> 30} GiB.")
    return min(layers, shape.num_layers)


def provenance() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    import torch
    import triton

    from vllm_sirius.measuring.machine import describe_source

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": describe_source(),
        "command": sys.argv[1:],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    from benchmarks.gpu.shapes import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layers", type=int, help="layers to build; as many as fit unless given")
    parser.add_argument("--length", type=int, default=1024, help="tokens in the KV cache, a multiple of 8")
    parser.add_argument("--verify", type=int, nargs="+", default=[8, 10, 16, 64], help="numbers of tokens to verify")
    parser.add_argument("--ffn-tokens", type=int, nargs="+", default=[1, 4, 16, 32], help="batches of FFNs alone")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--check", action="store_true", help="check correctness on CPU in Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.length % 8 or arguments.length < max(arguments.verify):
        parser.error("--length must be a multiple of 8 and hold all verified tokens")
    return arguments


if __name__ == "__main__":
    main()
