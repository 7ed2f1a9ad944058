"""Measures the CPU kernels of draft and target against vLLM's packed dense layers.

Example:
    examples/setup/run_in_environment.sh python benchmarks/kernels/cpu_ffn.py --tokens 1 4 8 16 --threads 1 2

An arm is one way to run an FFN or a linear layer. Every repeat runs all arms one after the other, each over all its layers,
so that a busy moment of the machine hits all of them and the weights of one layer have left the caches before they are read
again. A layer is one sample of wall time.

Decoding is bound by the bandwidth of the memory, so the table shows what an arm must read, how fast it reads it, and how
long it takes in units of the time in which vLLM's packed GEMV, one token, reads as many bytes: 1.00 is as good as vLLM.

Each number of threads has a process of its own, because oneDNN keeps the number it saw first, and threads are bound to
cores as vLLM binds them, because the system may otherwise put two of them on one core. The last line of a table says how
much of the cores the process had: below 95 %, another program was in the way and the figures say little.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from vllm_sirius.kernels.activation import Activation
from vllm_sirius.kernels.cpu.kernels import coarse_ffn, fine_ffn, instruction_set
from vllm_sirius.kernels.cpu.low_bit_kernels import low_bit_coarse_ffn, low_bit_fine_ffn, low_bit_linear
from vllm_sirius.kernels.cpu.low_bit_panel_kernels import panels_ffn, panels_linear
from vllm_sirius.kernels.cpu.panel_linear import panel_linear
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels, interleave
from vllm_sirius.weights.memory import empty_on_huge_pages
from vllm_sirius.weights.panels import Panels
from vllm_sirius.weights.rows import gates_first, neuron_rows

Layers = list[torch.Tensor]
DENSITIES = (0.5, 0.3)
BITS = (8, 4)


@dataclass
class Arm:
    """One way to run an FFN or a linear layer.

    Attributes:
        name: Shown in the table.
        run: Runs a layer on an input ``[tokens, hidden]``.
        num_bytes: Bytes of weights a layer reads.
        num_layers: Layers to go through.
        seconds: Samples.
    """

    name: str
    run: Callable[[int, torch.Tensor], torch.Tensor]
    num_bytes: float
    num_layers: int
    seconds: list[float] = field(default_factory=list)

    def quantile(self, part: float) -> float:
        """Seconds that `part` of the samples stay below."""
        return sorted(self.seconds)[int(part * (len(self.seconds) - 1))]


def main() -> None:
    """Starts one process per number of threads, which prints one table per number of tokens."""
    arguments = parse_arguments()
    if arguments.bound:
        torch.set_num_threads(arguments.threads[0])
        measure_all(arguments)
        return
    for threads in arguments.threads:
        command = [sys.executable, "-P", *sys.argv, "--bound", "--threads", str(threads)]
        subprocess.run(command, env={**os.environ, **bound_environment(threads)}, check=True)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; the defaults are the shapes of Qwen2.5-1.5B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--num-neurons", type=int, default=8960)
    parser.add_argument("--attention-rows", type=int, nargs="+", default=[2048, 1536], help="qkv and output projection")
    parser.add_argument(
        "--gate-up", action="store_true", help="the merged gate and up projection as a layer of its own"
    )
    parser.add_argument("--vocabulary", type=int, default=151936, help="rows of the lm_head; 0 leaves it out")
    parser.add_argument("--layers", type=int, default=6, help="enough that the weights do not fit into the caches")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dense", choices=["vllm", "torch"], default="vllm", help="whose dense layers to compare with")
    parser.add_argument("--arms", default="", help="only arms whose names contain this")
    parser.add_argument("--bound", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def bound_environment(threads: int) -> dict[str, str]:
    """Environment variables that bind each thread to a core, as vLLM's own do."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[:threads]]
    if "libiomp5" in os.environ.get("LD_PRELOAD", ""):
        affinity = f"granularity=fine,explicit,proclist=[{','.join(cores)}]"
        binding = {"KMP_AFFINITY": affinity, "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    else:
        binding = {"GOMP_CPU_AFFINITY": " ".join(cores)}
    return {"OMP_NUM_THREADS": str(threads), **binding}


def measure_all(arguments: argparse.Namespace) -> None:
    """Prints the tables of one number of threads."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"\n{threads} thread(s), kernels for {instruction_set()}, bf16 inputs")
    make_linear = packed_linear if arguments.dense == "vllm" else plain_linear
    rows = [draw_rows(arguments.num_neurons, arguments.hidden_size) for _ in range(arguments.layers)]
    dense = Arm("dense bf16", dense_ffn(rows, make_linear), rows[0].nbytes, len(rows))
    low = {bits: [LowBitRows.quantise(layer, bits) for layer in rows] for bits in BITS}
    sizes = [*arguments.attention_rows, *([2 * arguments.num_neurons] if arguments.gate_up else [])]
    linears = [
        arm
        for num_rows, num_layers in [*((size, len(rows)) for size in sizes), (arguments.vocabulary, 1)]
        for arm in linear_arms(num_rows, arguments.hidden_size, num_layers, make_linear)
    ]
    bandwidth = 0.0
    for tokens in sorted({1, *arguments.tokens}):
        inputs = torch.randn(tokens, arguments.hidden_size).bfloat16()
        arms = [dense, *ffn_arms(rows, low, inputs), *linears]
        arms = [arm for arm in arms if arm is dense or (arguments.arms in arm.name and tokens in arguments.tokens)]
        for arm in arms:
            arm.seconds.clear()
        busy = measure(arms, inputs, arguments.repeats) / threads
        bandwidth = bandwidth or dense.num_bytes / dense.quantile(0.5)
        if tokens in arguments.tokens:
            show(arms, tokens, bandwidth, busy)


def draw_rows(num_neurons: int, hidden_size: int) -> torch.Tensor:
    """Draws neuron-major weights ``bf16 [num_neurons, 3, hidden_size]``."""
    rows = empty_on_huge_pages((num_neurons, 3, hidden_size), torch.bfloat16)
    for part in rows.split(1024):
        part.copy_(torch.randn(part.shape) / hidden_size**0.5)
    return rows


Linear = Callable[[torch.Tensor], torch.Tensor]


def packed_linear(weight: torch.Tensor) -> Linear:
    """Packs a weight ``[out, in]`` as vLLM does on CPU."""
    from vllm import _custom_ops as ops

    packed = ops.create_onednn_mm(weight.t(), 32)

    def run(inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = ops.onednn_mm(packed, inputs, None)
        return output

    return run


def plain_linear(weight: torch.Tensor) -> Linear:
    """PyTorch's own linear layer."""
    return lambda inputs: F.linear(inputs, weight)


def dense_ffn(
    layers: Layers, make_linear: Callable[[torch.Tensor], Linear]
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The dense FFN with all its neurons."""
    built = []
    for rows in layers:
        gate_up = rows[:, :2].transpose(0, 1).reshape(-1, rows.shape[2])
        built.append((make_linear(gate_up), make_linear(rows[:, 2].T.contiguous())))

    def run(layer: int, inputs: torch.Tensor) -> torch.Tensor:
        gate_up, down = built[layer]
        both = gate_up(inputs)
        if not hasattr(torch.ops._C, "silu_and_mul"):
            gate, up = both.chunk(2, dim=-1)
            return down(F.silu(gate) * up)
        hidden = both.new_empty(both.shape[0], both.shape[1] // 2)
        torch.ops._C.silu_and_mul(hidden, both)
        return down(hidden)

    return run


def ffn_arms(layers: Layers, low: dict[int, list[LowBitRows]], inputs: torch.Tensor) -> Iterator[Arm]:
    """Coarse with neurons drawn at random for every layer, fine with half of them, and all quantised ones."""
    num_neurons, num_layers = layers[0].shape[0], len(layers)
    kept = {
        density: [torch.randperm(num_neurons)[: int(density * num_neurons)].sort().values.int() for _ in layers]
        for density in DENSITIES
    }
    fine_share = (1 + 2 * united_density(layers[0], inputs)) / 3
    half, silu = num_neurons // 2, Activation.SILU
    fine_layers = [with_gates_first(layer) for layer in layers]
    for density, indices in kept.items():

        def coarse(layer: int, inputs: torch.Tensor, indices: Layers = indices) -> torch.Tensor:
            return coarse_ffn(inputs, layers[layer], indices[layer], silu)

        yield Arm(f"bf16 coarse {density}", coarse, density * layers[0].nbytes, num_layers)
    fine_bytes = fine_share * layers[0].nbytes
    yield Arm(
        "bf16 fine 0.5", lambda layer, inputs: fine_ffn(inputs, fine_layers[layer], half, silu), fine_bytes, num_layers
    )
    for bits, rows in low.items():
        num_bytes = rows[0].num_bytes
        for density, chosen in [*kept.items(), (1.0, None)]:

            def low_coarse(
                layer: int, inputs: torch.Tensor, rows: list[LowBitRows] = rows, chosen: Layers | None = chosen
            ) -> torch.Tensor:
                return low_bit_coarse_ffn(inputs, rows[layer], chosen[layer] if chosen else None, silu)

            name = f"int{bits} coarse {density}" if chosen else f"int{bits} none"
            yield Arm(name, low_coarse, density * num_bytes, num_layers)

        fine_rows = [LowBitRows.quantise(layer, bits) for layer in fine_layers]

        def low_fine(layer: int, inputs: torch.Tensor, rows: list[LowBitRows] = fine_rows) -> torch.Tensor:
            return low_bit_fine_ffn(inputs, rows[layer], half, silu)

        yield Arm(f"int{bits} fine 0.5", low_fine, fine_share * num_bytes, num_layers)
    panels = [panels_of(rows) for rows in layers]
    num_bytes = panels[0][0].nbytes + panels[0][1].num_bytes
    yield Arm("int4 panels", lambda layer, inputs: panels_ffn(inputs, *panels[layer], silu), num_bytes, num_layers)


def with_gates_first(rows: torch.Tensor) -> torch.Tensor:
    """The rows ``[neurons, 3, hidden]`` as the kernels for fine sparsity read them."""
    gate, up, down = rows.unbind(1)
    return neuron_rows(torch.cat([gate, up]), down.T, layout=gates_first)


def panels_of(rows: torch.Tensor) -> tuple[torch.Tensor, LowBitPanels]:
    """4-bit panels of neuron-major weights: gate and up by turns, and down."""
    gate, up, down = (LowBitPanels.quantise(part) for part in (rows[:, 0], rows[:, 1], rows[:, 2].T))
    return interleave(gate, up), down


def linear_arms(
    num_rows: int, width: int, num_layers: int, make_linear: Callable[[torch.Tensor], Linear]
) -> Iterator[Arm]:
    """A linear layer: dense by both kernels, 8 and 4 bits, 4 bits in panels."""
    if num_rows == 0:
        return
    weights = [(torch.randn(num_rows, width) / width**0.5).bfloat16() for _ in range(num_layers)]
    dense = [make_linear(weight) for weight in weights]
    size = f"{num_rows}x{width}"
    yield Arm(f"bf16 {size}", lambda layer, inputs: dense[layer](inputs), weights[0].nbytes, num_layers)
    for bits in BITS:
        low = [LowBitRows.quantise(weight, bits) for weight in weights]

        def run(layer: int, inputs: torch.Tensor, low: list[LowBitRows] = low) -> torch.Tensor:
            return low_bit_linear(inputs, low[layer])

        yield Arm(f"int{bits} {size}", run, low[0].num_bytes, num_layers)
    panels = [Panels.pack(weight).weights for weight in weights]
    yield Arm(
        f"panels {size}",
        lambda layer, inputs: panel_linear(inputs, panels[layer], num_rows),
        weights[0].nbytes,
        num_layers,
    )
    low_panels = [LowBitPanels.quantise(weight) for weight in weights]
    num_bytes = low_panels[0].num_bytes
    yield Arm(
        f"int4 panels {size}", lambda layer, inputs: panels_linear(inputs, low_panels[layer]), num_bytes, num_layers
    )


def united_density(rows: torch.Tensor, inputs: torch.Tensor) -> float:
    """Part of the neurons that at least one token keeps under fine sparsity of 50 %."""
    gate = F.silu(inputs.float() @ rows[:, 0].float().T)
    kept = gate.abs().topk(rows.shape[0] // 2, dim=-1).indices
    return kept.unique().numel() / rows.shape[0]


def measure(arms: list[Arm], inputs: torch.Tensor, repeats: int) -> float:
    """Takes the samples, arms alternated.

    Returns:
        Cores that the process had, on average.
    """
    for arm in arms:
        arm.run(0, inputs)
    start, start_busy = time.perf_counter(), time.process_time()
    for _, arm in itertools.product(range(repeats), arms):
        for layer in range(arm.num_layers):
            before = time.perf_counter()
            arm.run(layer, inputs)
            arm.seconds.append(time.perf_counter() - before)
    return (time.process_time() - start_busy) / (time.perf_counter() - start)


def show(arms: list[Arm], tokens: int, bandwidth: float, busy: float) -> None:
    """Prints milliseconds, bytes, GB/s, and time in units of what vLLM's packed GEMV takes for the bytes."""
    print(f"\n{tokens} token(s); the dense FFN of one token reads {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':18} | median ms | fastest ms | MB to read | GB/s median, fastest | of its time at dense speed")
    for arm in arms:
        median, fastest = arm.quantile(0.5), arm.quantile(0.0)
        speeds = [arm.num_bytes / seconds / 1e9 for seconds in (median, fastest)]
        print(
            f"{arm.name:18} | {median * 1e3:9.3f} | {fastest * 1e3:10.3f} | {arm.num_bytes / 1e6:10.2f} | "
            f"{speeds[0]:12.1f} {speeds[1]:7.1f} | {median * bandwidth / arm.num_bytes:10.2f}"
        )
    print(f"the process had {busy:.0%} of its cores")


if __name__ == "__main__":
    main()
