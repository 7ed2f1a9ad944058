"""Measures the reduced-FFN kernels on CPU against vLLM's packed dense FFN.

Example:
    python benchmarks/kernels/cpu_ffn.py --tokens 1 4 8 16 --threads 1 2

Every repeat runs all arms one after the other, each over all layers, so that a busy moment of the machine hits all of
them and the weights of one layer have left the caches before they are read again. A layer is one sample of wall time. It
counts only if the process had the cores it asked for meanwhile (its CPU time is at least 85 % of threads x wall time):
two threads that share one core with another program look just like one thread. The table says how many samples counted.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from vllm_sirius.ffn.activation import Activation
from vllm_sirius.ffn.kernels.cpu.kernels import coarse_ffn, fine_ffn, instruction_set
from vllm_sirius.ffn.kernels.cpu.memory import empty_rows

Layers = list[torch.Tensor]

FULL_CORES = 0.85
"""Part of the asked-for CPU time that a sample must have had to count."""


@dataclass
class Arm:
    """One way to run an FFN.

    Attributes:
        name: Shown in the table.
        run: Runs the FFN of a layer on an input ``[tokens, hidden]``.
        byte_share: Bytes of weights it reads, as part of the dense FFN's.
        seconds: Samples that count.
        num_samples: All samples, one per layer and repeat.
    """

    name: str
    run: Callable[[int, torch.Tensor], torch.Tensor]
    byte_share: float
    seconds: list[float] = field(default_factory=list)
    num_samples: int = 0

    def quantile(self, part: float) -> float:
        """Seconds that `part` of the samples stay below."""
        return sorted(self.seconds)[int(part * (len(self.seconds) - 1))]


def main() -> None:
    """Prints one table per number of threads and tokens."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    print(f"kernels for {instruction_set()}, {arguments.num_neurons} neurons of width {arguments.hidden_size}, bf16")
    layers = [draw_rows(arguments.num_neurons, arguments.hidden_size) for _ in range(arguments.layers)]
    dense = packed_ffn(layers) if arguments.dense == "vllm" else plain_ffn(layers)
    for threads, tokens in itertools.product(arguments.threads, arguments.tokens):
        torch.set_num_threads(threads)
        inputs = torch.randn(tokens, arguments.hidden_size).bfloat16()
        arms = [Arm("dense", dense, 1.0), *reduced_arms(layers, inputs)]
        measure(arms, inputs, len(layers), arguments.repeats, threads)
        show(arms, threads, tokens, layers[0].nbytes)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; the defaults are the shapes of Qwen2.5-1.5B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--num-neurons", type=int, default=8960)
    parser.add_argument("--layers", type=int, default=6, help="enough that the weights do not fit into the caches")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dense", choices=["vllm", "torch"], default="vllm", help="whose dense FFN to compare with")
    return parser.parse_args()


def draw_rows(num_neurons: int, hidden_size: int) -> torch.Tensor:
    """Draws neuron-major weights ``bf16 [num_neurons, 3, hidden_size]``."""
    rows = empty_rows(num_neurons, hidden_size, torch.bfloat16)
    for part in rows.split(1024):
        part.copy_(torch.randn(part.shape) / hidden_size**0.5)
    return rows


def packed_ffn(layers: Layers) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Packs the weights as vLLM does on CPU and runs its FFN on them."""
    from vllm import _custom_ops as ops

    packed = []
    for rows in layers:
        gate_up = rows[:, :2].transpose(0, 1).reshape(-1, rows.shape[2])
        down = rows[:, 2].T.contiguous()
        packed.append((ops.create_onednn_mm(gate_up.t(), 32), ops.create_onednn_mm(down.t(), 32)))

    def run(layer: int, inputs: torch.Tensor) -> torch.Tensor:
        gate_up, down = packed[layer]
        both = ops.onednn_mm(gate_up, inputs, None)
        hidden = torch.empty(inputs.shape[0], both.shape[1] // 2, dtype=both.dtype)
        torch.ops._C.silu_and_mul(hidden, both)
        output: torch.Tensor = ops.onednn_mm(down, hidden, None)
        return output

    return run


def plain_ffn(layers: Layers) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Runs the dense FFN with PyTorch's linear layers."""
    weights = [(*(rows[:, which].contiguous() for which in range(2)), rows[:, 2].T.contiguous()) for rows in layers]

    def run(layer: int, inputs: torch.Tensor) -> torch.Tensor:
        gate, up, down = weights[layer]
        return F.linear(F.silu(F.linear(inputs, gate)) * F.linear(inputs, up), down)

    return run


def reduced_arms(layers: Layers, inputs: torch.Tensor) -> list[Arm]:
    """Coarse with 50 % and 30 % of the neurons, drawn at random for every layer, and fine with 50 %."""
    num_neurons = layers[0].shape[0]
    arms = []
    for density in (0.5, 0.3):
        kept = [torch.randperm(num_neurons)[: int(density * num_neurons)].sort().values.int() for _ in layers]

        def coarse(layer: int, inputs: torch.Tensor, kept: Layers = kept) -> torch.Tensor:
            return coarse_ffn(inputs, layers[layer], kept[layer], Activation.SILU)

        arms.append(Arm(f"coarse {density}", coarse, density))

    def fine(layer: int, inputs: torch.Tensor) -> torch.Tensor:
        return fine_ffn(inputs, layers[layer], num_neurons // 2, Activation.SILU)

    return [*arms, Arm("fine 0.5", fine, (1 + 2 * united_density(layers[0], inputs)) / 3)]


def united_density(rows: torch.Tensor, inputs: torch.Tensor) -> float:
    """Part of the neurons that at least one token keeps under fine sparsity of 50 %."""
    gate = F.silu(inputs.float() @ rows[:, 0].float().T)
    kept = gate.abs().topk(rows.shape[0] // 2, dim=-1).indices
    return kept.unique().numel() / rows.shape[0]


def measure(arms: list[Arm], inputs: torch.Tensor, num_layers: int, repeats: int, threads: int) -> None:
    """Takes the samples, arms alternated."""
    for arm in arms:
        arm.run(0, inputs)
    for _ in range(repeats):
        for arm in arms:
            for layer in range(num_layers):
                start, start_busy = time.perf_counter(), time.process_time()
                arm.run(layer, inputs)
                busy, seconds = time.process_time() - start_busy, time.perf_counter() - start
                arm.num_samples += 1
                if busy >= FULL_CORES * threads * seconds:
                    arm.seconds.append(seconds)


def show(arms: list[Arm], threads: int, tokens: int, dense_bytes: int) -> None:
    """Prints milliseconds, GB/s, and time relative to dense beside the share of its bytes."""
    print(f"\n{threads} thread(s), {tokens} token(s)")
    half = f"{'GB/s':>6} {'of dense':>8} |"
    print(f"{'':12} | {'median ms':>9} {half} {'fastest ms':>11} {half} bytes | samples")
    for arm in arms:
        if not arm.seconds or not arms[0].seconds:
            print(f"{arm.name:12} | {len(arm.seconds)} of {arm.num_samples} samples count: the machine is too busy")
            continue
        cells = []
        for part in (0.5, 0.0):
            seconds = arm.quantile(part)
            speed = arm.byte_share * dense_bytes / seconds / 1e9
            cells.append((seconds * 1e3, speed, seconds / arms[0].quantile(part)))
        (median, speed, ratio), (best, best_speed, best_ratio) = cells
        print(
            f"{arm.name:12} | {median:9.2f} {speed:6.1f} {ratio:8.2f} | {best:11.2f} {best_speed:6.1f} {best_ratio:8.2f}"
            f" | {arm.byte_share:5.2f} | {len(arm.seconds)} of {arm.num_samples}"
        )


if __name__ == "__main__":
    main()
