"""Checks of an engine whose weights are streamed: `python -m benchmarks.offload.checks --model FOLDER --checks NAME`.

* ``identity``: the same tokens as the engine with its weights in memory and ``target_kernels: sirius``.
* ``batch``: how much faster prompts are answered several at a time than one after the other.
* ``memory``: what the weights take while they are loaded, first from the checkpoint and then from the file, beside the plan.
* ``start``: how long a first start takes and a second one, and what the second reads of the checkpoint.
* ``rate``: how fast the file is streamed, beside four `dd` that read it past the page cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError, exit_status
from benchmarks.identity import differences
from benchmarks.offload import arms, load_memory, page_cache, setting
from benchmarks.offload.answering import AnsweringError
from benchmarks.offload.cage import Cage
from benchmarks.offload.run import say, weight_files
from benchmarks.offload.setting import GB, OffloadSetting
from benchmarks.prompts import Prompt
from vllm_sirius.config import OFFLOAD_KERNEL_SIZE
from vllm_sirius.measuring.engine import Engine, EngineError
from vllm_sirius.measuring.side_by_side import WARM_UP_TOKENS, engine_options
from vllm_sirius.offload.stream import Group, WeightStream
from vllm_sirius.offload.weight_file import WeightFile

FILE = "checks.json"
ROUNDS = 5
"""Of a stream, timed together: what was read ahead before them is a small part then."""

DD_STREAMS = 4
DD_BLOCK = 4 << 20


class Checks:
    """The checks of one model.

    Args:
        what: Where and on what: arms and repeats as of the comparison.
        batch: Prompts that are answered together.
    """

    def __init__(self, what: OffloadSetting, batch: int) -> None:
        self._what, self._batch = what, batch
        (self._arm,) = what.arms

    def identity(self) -> dict[str, Any]:
        """Compares tokens, prompts in batches, on a disk as fast as the first rate."""
        with self._engine(self._what.rates[0], self._streaming, "identity-disk") as engine:
            streamed = engine.generate([p.token_ids for p in self._prompts], self._what.max_tokens)
        in_memory = {"method": "sirius", "target_kernels": "sirius", "kernel_size": OFFLOAD_KERNEL_SIZE}
        with closing(Engine(self._options(in_memory), self._log("identity-memory"), answer_seconds=3600)) as engine:
            plain = engine.generate([p.token_ids for p in self._prompts], self._what.max_tokens)
        found = differences(streamed.token_ids, plain.token_ids)
        return {
            "prompts": len(self._prompts),
            "tokens": streamed.num_tokens,
            "identical": len(self._prompts) - len(found),
            "differences": [str(each) for each in found],
            "accepted": streamed.num_accepted_tokens,
            "drafted": streamed.num_draft_tokens,
        }

    def batch(self) -> dict[str, Any]:
        """Compares tokens per second, turns alternated, at each rate. As in a server, the next prompt joins when one is done."""
        prompts = [p.token_ids for p in self._prompts]
        return {f"{rate:g}": self._batch_at(rate, prompts) for rate in self._what.rates}

    def _batch_at(self, rate: float, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        alone, together = [], []
        with self._engine(rate, self._streaming, f"batch-{rate:g}") as engine:
            engine.generate(prompts[: self._batch], WARM_UP_TOKENS)
            for _ in range(self._what.repeats):
                each = [engine.generate([prompt], self._what.max_tokens) for prompt in prompts]
                alone.append(sum(a.num_tokens for a in each) / sum(a.seconds for a in each))
                all_at_once = engine.generate(prompts, self._what.max_tokens)
                together.append(all_at_once.num_tokens / all_at_once.seconds)
                say(f"  {rate:g} GB/s: {alone[-1]:.2f} tokens/s alone, {together[-1]:.2f} together")
        ratios = [one / other for one, other in zip(together, alone, strict=True)]
        return {
            "batch": self._batch,
            "prompts": len(prompts),
            "alone": alone,
            "together": together,
            "ratio": statistics.median(ratios),
        }

    def memory(self) -> dict[str, Any]:
        """Looks at a first start, which writes the file, and at one that reads it."""
        self._remove_file()
        found = {}
        for name in ("from the checkpoint", "from the file"):
            with Cage(self._what.limits(0)) as cage:
                options = self._options(self._streaming)
                sizes = load_memory.measure(
                    options, self._what.prefix(cage, 0), self._log(f"memory {name}".replace(" ", "-"))
                )
                kernel = cage.report()
            found[name] = {**sizes, "peak_over_plan": sizes["peak"] / sizes["plan"], **kernel.as_dict()}
            say(f"  {name}: {sizes['peak'] / GB:.2f} GB at most, planned {sizes['plan'] / GB:.2f}")
        return found

    def start(self) -> dict[str, Any]:
        """Times a first start, which writes the file, and second ones; nothing is in the page cache before."""
        self._remove_file()
        checkpoint = page_cache.files_of(Path(self._what.sizes.model))
        seconds, cached = [], []
        for number in range(1 + self._what.repeats):
            page_cache.drop([*checkpoint, *weight_files(self._arm)])
            started = time.monotonic()
            with self._engine(0, self._streaming, f"start-{number}"):
                seconds.append(time.monotonic() - started)
            cached.append(sum(map(cached_bytes, checkpoint)))
            say(f"  start {number + 1}: {seconds[-1]:.1f} s, then {cached[-1] / GB:.2f} GB of the checkpoint in memory")
        second = statistics.median(seconds[1:])
        return {"first": seconds[0], "second": seconds[1:], "ratio": second / seconds[0], "checkpoint_read": cached[1:]}

    def rate(self) -> dict[str, Any]:
        """Streams the file and reads it with `dd`, by turns, without a bound of the rate."""
        paths = weight_files(self._arm)
        if not paths:
            raise BenchmarkError("--checks rate: there is no file yet; another check writes it")
        path = paths[0]
        file = WeightFile(path)
        groups = [file.group(number) for number in range(len(file.groups))]
        streamed, plain = [], []
        with closing(WeightStream(path, groups)) as stream:
            _stream_rate(stream, groups, 1)  # checks the sums, and is not measured
            start, end = groups[0].offset, groups[-1].offset + groups[-1].num_bytes
            _dd_rate(path, start, end)
            for _ in range(self._what.repeats):
                plain.append(_dd_rate(path, start, end))
                streamed.append(_stream_rate(stream, groups, ROUNDS))
                say(f"  {streamed[-1] / GB:.2f} GB/s streamed, {plain[-1] / GB:.2f} by {DD_STREAMS} dd")
        ratios = [one / other for one, other in zip(streamed, plain, strict=True)]
        return {"streamed": streamed, "dd": plain, "ratio": statistics.median(ratios)}

    @property
    def _prompts(self) -> list[Prompt]:
        """Tasks by turns."""
        return [prompt for each in zip(*self._what.prompts.values(), strict=True) for prompt in each]

    @property
    def _streaming(self) -> dict[str, Any]:
        return {**self._arm.options, "offload_path": str(self._arm.files[0])}

    def _options(self, sirius: dict[str, Any]) -> dict[str, Any]:
        sizes = self._what.sizes
        return engine_options(
            sizes.model,
            "bfloat16",
            sizes.max_model_len,
            self._batch,
            sizes.kv_cache_bytes,
            enforce_eager=True,
            speculative_config=sirius,
        )

    @contextmanager
    def _engine(self, rate: float, sirius: dict[str, Any], log: str) -> Iterator[Engine]:
        with Cage(self._what.limits(rate)) as cage:
            options, prefix = self._options(sirius), self._what.prefix(cage, rate)
            with closing(Engine(options, self._log(log), prefix=prefix, answer_seconds=3600)) as engine:
                yield engine

    def _log(self, name: str) -> Path:
        return self._what.folder / f"{name}.log"

    def _remove_file(self) -> None:
        for path in weight_files(self._arm):
            path.unlink()


CHECKS: dict[str, Callable[[Checks], dict[str, Any]]] = {
    "identity": Checks.identity,
    "batch": Checks.batch,
    "memory": Checks.memory,
    "start": Checks.start,
    "rate": Checks.rate,
}


def cached_bytes(path: Path) -> int:
    """Bytes of a file that lie in the page cache.

    Args:
        path: The file.
    """
    with path.open("rb") as file:
        return page_cache.cached_bytes(file.fileno())


def _stream_rate(stream: WeightStream, groups: Sequence[Group], rounds: int) -> float:
    """Bytes per second of so many rounds."""
    started = time.perf_counter()
    for _ in range(rounds):
        for number, group in enumerate(groups):
            stream.wait(number, group.num_bytes)
            stream.release(number)
    return rounds * sum(group.num_bytes for group in groups) / (time.perf_counter() - started)


def _dd_rate(path: Path, start: int, end: int) -> float:
    """Bytes per second of several `dd`, each of which reads a part of what is streamed."""
    first, blocks = -(-start // DD_BLOCK), (end - start) // DD_BLOCK // DD_STREAMS
    started = time.perf_counter()
    readers = [
        subprocess.Popen(
            [
                "dd",
                f"if={path}",
                "of=/dev/null",
                f"bs={DD_BLOCK}",
                f"count={blocks}",
                f"skip={first + i * blocks}",
                "iflag=direct",
            ],
            stderr=subprocess.DEVNULL,
        )
        for i in range(DD_STREAMS)
    ]
    failed = sum(reader.wait() != 0 for reader in readers)
    if failed:
        raise BenchmarkError(f"{path}: dd cannot read it past the page cache; put it on a disk that has O_DIRECT")
    return blocks * DD_BLOCK * DD_STREAMS / (time.perf_counter() - started)


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status: 1 if tokens differ.

    Raises:
        BenchmarkError: If something is missing.
    """
    given.arms = [arms.OURS]
    what = setting.prepare(given)
    found: dict[str, Any] = {"provenance": setting.new_result(what).provenance}
    checks = Checks(what, given.batch)
    for name in given.checks:
        say(f"{name} ...")
        try:
            found[name] = CHECKS[name](checks)
        except (EngineError, AnsweringError) as error:
            raise BenchmarkError(f"--checks {name}: {error}") from error
        (what.folder / FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        say(f"{name}: {json.dumps(found[name])}")
    same = found.get("identity", {"identical": 0, "prompts": 0})
    return int(same["identical"] < same["prompts"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks one model.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 1 after a failure, 130 after an interruption.
    """
    parser = argparse.ArgumentParser(
        prog="benchmarks.offload.checks", description="Checks an engine whose weights are streamed."
    )
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="default: all")
    parser.add_argument("--batch", type=int, default=4, help="prompts answered together (default: %(default)s)")
    setting.add_arguments(parser)
    return exit_status(functools.partial(run, parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
