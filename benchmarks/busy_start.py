"""Checks that a busy start leaves no slow engine: `python -m benchmarks.busy_start --model PATH`.

One engine with Sirius starts on a quiet machine, another beside busy loops that end when it is ready. Then both answer the same
prompts by turns, one at a time. What the first seconds gave is reported apart: by then the second engine must have learnt what
its start got wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import prompts
from benchmarks.errors import BenchmarkError, exit_status
from benchmarks.setting import positive
from vllm_sirius.measuring.engine import Engine, EngineError
from vllm_sirius.measuring.side_by_side import PAUSE_SECONDS, engine_options

QUIET, BUSY = "undisturbed", "disturbed"
BAR = 0.95
MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class Turn:
    """An answer of one engine.

    Attributes:
        engine: Whose.
        prompt: Number of the prompt's round; both engines answer in each.
        began: Seconds since the first prompt.
        tokens: Generated tokens.
        seconds: Wall time of the answer.
    """

    engine: str
    prompt: int
    began: float
    tokens: int
    seconds: float


@contextmanager
def busy_loops(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keeps cores busy while the block runs.

    Args:
        count: Processes.

    Yields:
        The processes.
    """
    loops = [subprocess.Popen([sys.executable, "-P", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def rates(turns: Sequence[Turn], settle: float) -> dict[bool, dict[str, float]]:
    """Tokens per second.

    Args:
        turns: All of them.
        settle: Rounds that began before so many seconds count apart.

    Returns:
        By whether the engines had settled, by engine; nothing for an engine without such turns.
    """
    began: dict[int, float] = {}
    for turn in turns:
        began[turn.prompt] = min(turn.began, began.get(turn.prompt, turn.began))
    found: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for settled in found:
        own = [turn for turn in turns if (began[turn.prompt] >= settle) is settled]
        for name in {turn.engine for turn in own}:
            parts = [turn for turn in own if turn.engine == name]
            found[settled][name] = sum(turn.tokens for turn in parts) / sum(turn.seconds for turn in parts)
    return found


def start(given: argparse.Namespace, name: str, folder: Path) -> Engine:
    """Starts one of the engines and prints what it says of itself.

    Args:
        given: The options of the program.
        name: Which one.
        folder: Takes its log.

    Returns:
        The engine.

    Raises:
        BenchmarkError: If it does not start.
    """
    options = engine_options(
        given.model,
        given.dtype,
        MAX_MODEL_LEN,
        given.max_num_seqs,
        given.kv_cache_memory_bytes,
        enforce_eager=not given.compiled,
        speculative_config={"method": "sirius", **json.loads(given.speculative_config)},
    )
    log = folder / f"{name}.log"
    started = time.monotonic()
    try:
        engine = Engine(options, log)
    except EngineError as error:
        raise BenchmarkError(f"the {name} engine: {error}") from error
    print(f"{name}: started in {time.monotonic() - started:.0f} s", flush=True)
    for line in log.read_text(errors="replace").splitlines():
        if "Sirius: " in line:
            print(f"  {line.partition('Sirius: ')[2]}", flush=True)
    return engine


def take_turns(engines: dict[str, Engine], token_ids: Sequence[list[int]], given: argparse.Namespace) -> list[Turn]:
    """Lets both engines answer the prompts, until each has given enough tokens after the first seconds.

    Args:
        engines: By name.
        token_ids: The prompts; they come again when all are answered.
        given: The options of the program.

    Returns:
        All turns.
    """
    turns: list[Turn] = []
    first = time.monotonic()
    settled = dict.fromkeys(engines, 0)
    number = 0
    while min(settled.values()) < given.tokens:
        names = list(engines) if number % 2 == 0 else list(reversed(engines))
        began = time.monotonic() - first
        for name in names:
            time.sleep(PAUSE_SECONDS)
            turn_began = time.monotonic() - first
            answers = engines[name].generate([token_ids[number % len(token_ids)]], given.max_tokens, ignore_eos=True)
            turns.append(Turn(name, number, turn_began, answers.num_tokens, answers.seconds))
            if began >= given.settle:
                settled[name] += answers.num_tokens
        number += 1
    return turns


def run(given: argparse.Namespace) -> int:
    """Runs the check.

    Args:
        given: The options of the program.

    Returns:
        The exit status: 1 if the disturbed engine stays below the bar.

    Raises:
        BenchmarkError: If a prompt or an engine is missing.
    """
    found = prompts.collect(given.model, given.data, ["gsm8k", "humaneval"], given.prompts, 0)
    # One task after the other, so that no stretch of time has only one of them.
    token_ids = [prompt.token_ids for pair in zip(*found.values(), strict=True) for prompt in pair]
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = given.output or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        try:
            engines[QUIET] = start(given, QUIET, logs)
            with busy_loops(given.busy):
                engines[BUSY] = start(given, BUSY, logs)
            turns = take_turns(engines, token_ids, given)
        except EngineError as error:
            raise BenchmarkError(str(error)) from error
        finally:
            for engine in engines.values():
                engine.close()
    status = 0
    for settled, by_engine in rates(turns, given.settle).items():
        when = f"after {given.settle:g} s" if settled else f"first {given.settle:g} s"
        if len(by_engine) < 2:
            print(f"{when}: no answers")
            continue
        ratio = by_engine[BUSY] / by_engine[QUIET]
        print(f"{when}: {QUIET} {by_engine[QUIET]:.1f}, {BUSY} {by_engine[BUSY]:.1f} tokens/s, ratio {ratio:.3f}")
        if settled:
            status = int(ratio < BAR)
            print(f"{'reached' if not status else 'MISSED'}: the bar is {BAR}")
    return status


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: The arguments; those of the process by default.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        prog="benchmarks.busy_start", description="Checks that a busy start leaves no slow engine."
    )
    parser.add_argument("--model", required=True, help="path or hub name")
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights (default: %(default)s)")
    parser.add_argument("--speculative-config", default="{}", metavar="JSON", help="further options of Sirius")
    parser.add_argument("--compiled", action="store_true", help="compile the models")
    parser.add_argument("--busy", type=positive, default=os.cpu_count() or 2, metavar="N", help="busy loops")
    parser.add_argument("--settle", type=float, default=30.0, metavar="S", help="seconds that count apart")
    parser.add_argument(
        "--tokens", type=positive, default=1200, metavar="N", help="of each engine after that, at least"
    )
    parser.add_argument("--max-tokens", type=positive, default=128, metavar="N", help="of an answer")
    parser.add_argument("--prompts", type=positive, default=12, metavar="N", help="of each data set")
    parser.add_argument("--data", type=Path, default=prompts.DATA, help="folder of the data sets")
    parser.add_argument("--max-num-seqs", type=positive, default=4, metavar="N", help="of an engine")
    parser.add_argument("--kv-cache-memory-bytes", type=positive, default=1 << 29, metavar="N", help="of an engine")
    parser.add_argument("--output", type=Path, help="folder that keeps the engines' logs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: Command line, for tests.

    Returns:
        The exit status.
    """
    given = parse_arguments(arguments)
    return exit_status(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
