"""Command line of the comparison on a throttled disk, and what is checked and made before anything is measured."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import prompts, results
from benchmarks import setting as shared
from benchmarks.errors import BenchmarkError
from benchmarks.offload import arms, llama
from benchmarks.offload.arms import Arm, Sizes
from benchmarks.offload.cage import Cage, Limits, disk_of
from benchmarks.offload.groups import GroupError
from benchmarks.offload.llama import LlamaFiles
from benchmarks.offload.random_model import has_random_weights
from benchmarks.prompts import Prompt
from benchmarks.results import Result
from vllm_sirius.config import MAX_KERNEL_SIZE, SiriusConfig
from vllm_sirius.measuring import memory
from vllm_sirius.measuring.machine import describe_machine
from vllm_sirius.measuring.side_by_side import rounded_length

GB = 10**9
WEIGHTS_SHARE = 0.4
"""Of the checkpoint: enough for 4-bit copies, lm_head and buffers, too little for bf16."""

TOTAL, WEIGHTS = "total", "weights"
BOUNDS = {
    TOTAL: "the same for all arms",
    WEIGHTS: "the same memory for weights in all arms, and beside it what each program itself takes",
}
"""vLLM itself takes a gigabyte more than other programs, which weighs little beside a large model and much beside a small one."""

BLKIO, READER, NO_THROTTLE = "kernel", "reader", "none"
THROTTLES = {
    BLKIO: "bounded by the kernel (blkio.throttle or io.max), for all arms alike",
    READER: "a token bucket in our own reader: other programs read as fast as the disk gives",
    NO_THROTTLE: "not bounded",
}


@dataclass(frozen=True)
class OffloadSetting:
    """What is measured, and where.

    Attributes:
        sizes: What all arms share.
        name: The model's name in results.
        arms: The arms.
        prompts: Prompts of each task.
        rates: GB/s of the disk; 0 for no bound.
        memory_bytes: Bound of memory for vLLM; ``None`` without a cage.
        bound: One of `BOUNDS`.
        device: Disk of the files; empty where it is neither bounded nor counted.
        throttle: One of `THROTTLES`.
        max_tokens: Most tokens of an answer.
        slow_max_tokens: The same for arms without drafts.
        repeats: How often each prompt is answered.
        folder: Takes results and logs.
        llama: Where llama.cpp and its models lie.
    """

    sizes: Sizes
    name: str
    arms: list[Arm]
    prompts: dict[str, list[Prompt]]
    rates: list[float]
    memory_bytes: int | None
    bound: str
    device: str
    throttle: str
    max_tokens: int
    slow_max_tokens: int
    repeats: int
    folder: Path
    llama: LlamaFiles

    def limits(self, rate: float, arm: Arm | None = None) -> Limits:
        """What a cage allows.

        Args:
            rate: GB/s; 0 for no bound.
            arm: Who is to be in it; ``None`` for any engine of vLLM.
        """
        memory_bytes = self.memory_bytes
        if memory_bytes and self.bound == WEIGHTS and arm is not None and arm.own_bytes is not None:
            memory_bytes = self.sizes.weight_bytes + self.sizes.kv_cache_bytes + arm.own_bytes
        read = int(rate * GB) if rate and self.throttle == BLKIO else None
        return Limits(memory_bytes, read, self.device)

    def prefix(self, cage: Cage, rate: float) -> list[str]:
        """Words before the command of an arm.

        Args:
            cage: Its cage.
            rate: GB/s; 0 for no bound.
        """
        own = rate if self.throttle == READER else 0.0
        return [*cage.prefix, "env", f"{arms.RATE}={own:g}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--model", required=True, help="folder of a checkpoint in safetensors")
    add("--arms", nargs="+", default=list(arms.NAMES), metavar="NAME", help="default: %(default)s")
    add("--gb-per-second", nargs="+", type=_rate, default=[0.5, 1.0, 2.0], metavar="RATE", help="0: no bound")
    add("--throttle", choices=list(THROTTLES), default=BLKIO, help="who bounds the rate (default: %(default)s)")
    add("--memory-gb", type=float, help="bound of memory (default: what --weights-gb and the rest make)")
    add("--weights-gb", type=float, help=f"of it for weights (default: {WEIGHTS_SHARE} of the checkpoint)")
    add("--process-gb", type=float, default=1.6, help="of it for Python, PyTorch and vLLM (default: %(default)s)")
    add("--kv-cache-gb", type=float, default=0.26, help="of it for the KV cache (default: %(default)s)")
    add("--bound", choices=list(BOUNDS), default=TOTAL, help="what is the same for all arms (default: %(default)s)")
    add("--without-cage", action="store_true", help="go on where memory cannot be bounded; the results say so")
    add("--sirius", default="{}", metavar="JSON", help="more options of Sirius")
    add(
        "--llama-cpp",
        type=Path,
        default=os.environ.get(llama.VARIABLE),
        help=f"its folder (default: ${llama.VARIABLE})",
    )
    add(
        "--draft-max",
        nargs="+",
        type=shared.positive,
        default=[4, 8, 16],
        help="llama.cpp's drafts (default: %(default)s)",
    )
    add("--draft-type", default=llama.DRAFT_TYPE, help="type of llama.cpp's draft (default: %(default)s)")
    add("--slow-max-tokens", type=shared.positive, help="of an answer without drafts (default: --max-tokens)")
    add("--patience", type=float, default=3600, help="seconds to wait for an answer (default: %(default)s)")
    add("--repeats", type=shared.positive, default=3, help="default: %(default)s")
    add("--files", type=Path, default=Path("build", "offload"), help="folder for weight files (default: %(default)s)")
    add("--output", type=Path, help="folder (default: results/offload/MODEL-DATE)")
    add("--overwrite", action="store_true", help="replace the results in --output")
    shared.add_prompt_arguments(parser)
    parser.set_defaults(num_prompts=2)


def _rate(text: str) -> float:
    rate = float(text)
    if rate < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return rate


def prepare(given: argparse.Namespace) -> OffloadSetting:
    """Checks the command line, model, prompts and rights.

    Args:
        given: Options of `add_arguments`.

    Raises:
        BenchmarkError: If anything is missing or contradicts itself.
    """
    checkpoint = memory.weight_file_bytes(given.model)
    if not checkpoint:
        raise BenchmarkError(f"--model {given.model}: there is no folder with safetensors files")
    name = shared.model_name(given.model)
    date = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = given.output or Path("results", "offload", f"{name}-{date}")
    if (folder / results.FILE).exists() and not given.overwrite:
        raise BenchmarkError(f"--output {folder}: there are results already; choose another folder or add --overwrite")
    found = prompts.collect(given.model, given.data, given.tasks, given.num_prompts, given.offset)
    longest = given.max_tokens + max(len(prompt.token_ids) for each in found.values() for prompt in each)
    files = (given.files / name).absolute()
    files.mkdir(parents=True, exist_ok=True)
    total, sizes = _sizes(given, checkpoint, rounded_length(longest + MAX_KERNEL_SIZE))
    bound, device = _caged(given, total, files)
    llama_files = LlamaFiles(given.llama_cpp, files, given.draft_type)
    chosen = arms.choose(given.arms, sizes, _sirius(given, sizes, files), files, llama_files, given.draft_max)
    folder.mkdir(parents=True, exist_ok=True)
    return OffloadSetting(
        sizes,
        name,
        chosen,
        found,
        given.gb_per_second,
        bound,
        given.bound,
        device,
        given.throttle,
        given.max_tokens,
        given.slow_max_tokens or given.max_tokens,
        given.repeats,
        folder,
        llama_files,
    )


def _sizes(given: argparse.Namespace, checkpoint: int, max_model_len: int) -> tuple[int, Sizes]:
    """The bound of memory, and what it is divided into."""
    process, cache = int(given.process_gb * GB), int(given.kv_cache_gb * GB)
    weights = int(given.weights_gb * GB) if given.weights_gb else int(WEIGHTS_SHARE * checkpoint)
    total = process + cache + weights
    if given.memory_gb:
        total = int(given.memory_gb * GB)
        weights = weights if given.weights_gb else total - process - cache
    if weights <= 0 or weights + cache > total:
        raise BenchmarkError(
            f"--memory-gb {total / GB:.2f}: less --process-gb and --kv-cache-gb nothing is left for weights; raise it"
        )
    threads = len(os.sched_getaffinity(0))
    return total, Sizes(given.model, max_model_len, cache, weights, threads, given.patience)


def _sirius(given: argparse.Namespace, sizes: Sizes, files: Path) -> dict[str, Any]:
    try:
        more = json.loads(given.sirius)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"--sirius {given.sirius!r} is not JSON ({error}); quote it for the shell") from error
    own = {"offload": "disk", "offload_budget_gb": sizes.weight_bytes / GB, "offload_path": str(files)}
    options = {"method": "sirius", **own, **more}
    SiriusConfig.from_options(options)  # refuses bad options before anything slow
    return options


def _caged(given: argparse.Namespace, total: int, files: Path) -> tuple[int | None, str]:
    """Tries a cage; what cannot be had is an error that says what to do."""
    bound: int | None = total
    try:
        with Cage(Limits(total)):
            pass
    except GroupError as error:
        if not given.without_cage:
            raise BenchmarkError(
                f"memory cannot be bounded: {error}; or add --without-cage, and the results will say that it was not"
            ) from error
        print(f"warning: memory is not bounded: {error}", flush=True)
        bound = None
    try:
        device = disk_of(files)
        with Cage(Limits(None, GB, device)):
            pass
    except GroupError as error:
        if given.throttle == BLKIO and any(given.gb_per_second):
            raise BenchmarkError(
                f"the kernel cannot bound the disk: {error}; or choose --throttle {READER}, which bounds our reader alone"
            ) from error
        device = ""
    return bound, device


def new_result(what: OffloadSetting) -> Result:
    """Begins the file of a run.

    Args:
        what: What is measured.
    """
    provenance = {
        "kind": "offload",
        "model": what.name,
        "random_weights": has_random_weights(what.sizes.model),
        "checkpoint_bytes": memory.weight_file_bytes(what.sizes.model),
        "prompts": [
            {"task": p.task, "index": p.index, "tokens": len(p.token_ids)}
            for each in what.prompts.values()
            for p in each
        ],
        "repeats": what.repeats,
        "rates": what.rates,
        "sampling": {
            "temperature": 0.0,
            "max_tokens": what.max_tokens,
            "slow_max_tokens": what.slow_max_tokens,
        },
        "max_model_len": what.sizes.max_model_len,
        "cage": {
            "memory_bytes": what.memory_bytes,
            "bound": BOUNDS[what.bound],
            "weight_bytes": what.sizes.weight_bytes,
            "kv_cache_bytes": what.sizes.kv_cache_bytes,
            "throttle": THROTTLES[what.throttle],
        },
        "disk_bytes_per_second": {},
        **describe_machine(),
    }
    found = {
        arm.name: {
            "about": arm.about,
            "options": arm.options,
            "status": f"{results.NOT_INSTALLED}: {arm.missing}" if arm.missing else results.MEASURED,
            "rates": {},
        }
        for arm in what.arms
    }
    return Result(provenance, found)
