"""Measures a target that is larger than the GPU: its layers are streamed from pinned host memory, its draft is resident.

    python -m benchmarks.gpu.offload --shape 70b --output results.json
    python -m benchmarks.gpu.offload --device cpu          # correctness of the schedule, on any machine

Needs PyTorch (with Triton on a GPU), not vLLM. Run it in the repository's root. See README.md in the folder above.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs the checks or the measurements."""
    arguments = parse_arguments()
    if arguments.device == "cpu":
        from benchmarks.gpu.offload.check import run_checks

        run_checks()
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("No GPU: this machine can only run the correctness check, --device cpu.")
    from benchmarks.gpu.offload import report
    from benchmarks.gpu.run import provenance
    from vllm_sirius.measuring.machine import describe_machine

    torch.manual_seed(0)
    # The processor and its bus decide about the rate as much as the GPU does.
    result: dict[str, Any] = {**provenance(), "cpu": describe_machine()["cpu"], "models": []}
    print(f"{result['gpu']} beside {result['cpu']}, torch {result['torch']}")
    for name in arguments.shape:
        result["models"].append(measure_model(name, arguments))
        report.print_model(result["models"][-1])
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure_model(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one model, or ends the program where it does not fit.

    Args:
        name: One of `shapes.OFFLOAD_SHAPES`.
        arguments: From `parse_arguments`.

    Returns:
        What `measure.measure` returns.
    """
    import torch

    from benchmarks.gpu.offload import measure
    from benchmarks.gpu.offload.memory import MemoryTooSmallError
    from benchmarks.gpu.offload.queues import CudaQueues
    from benchmarks.gpu.shapes import OFFLOAD_SHAPES
    from vllm_sirius.offload.available import available_bytes

    shape, tokens = OFFLOAD_SHAPES[name], sorted(set(arguments.tokens))
    setting = measure.Setting(shape, arguments.buffers, arguments.distinct_layers, tokens, arguments.samples)
    torch.cuda.empty_cache()
    try:
        measure.require_memory(setting, torch.cuda.mem_get_info()[0], available_bytes())
    except MemoryTooSmallError as problem:
        sys.exit(str(problem))
    with torch.inference_mode():
        return measure.measure(setting, torch.device("cuda"), torch.bfloat16, CudaQueues())


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        command_line: That of the program unless given.
    """
    from benchmarks.gpu.shapes import OFFLOAD_SHAPES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.offload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", nargs="+", choices=OFFLOAD_SHAPES, default=list(OFFLOAD_SHAPES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the correctness check")
    parser.add_argument("--buffers", type=int, default=2, help="layers that are on the GPU at a time")
    parser.add_argument(
        "--distinct-layers",
        type=int,
        default=4,
        help="layers in the host's memory; a pass streams them again and again",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="numbers of tokens that a pass verifies"
    )
    parser.add_argument("--samples", type=int, default=5, help="of every time")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args(command_line)
    if not all(1 <= count <= 64 for count in arguments.tokens):
        parser.error("--tokens takes numbers from 1 to 64")
    if arguments.buffers < 1 or arguments.samples < 2:
        parser.error("--buffers must be at least 1 and --samples at least 2")
    if arguments.distinct_layers <= arguments.buffers:
        parser.error("--distinct-layers must exceed --buffers: a buffer that kept its last layer would go unnoticed")
    return arguments


if __name__ == "__main__":
    main()
