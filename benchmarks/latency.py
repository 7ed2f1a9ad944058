"""Runs `vllm bench latency` for each arm: `python -m benchmarks.latency --model PATH --arms NAME...`.

Its prompts are random tokens and it samples at temperature 1, so acceptance says little about real text: these figures
show what drafting costs, and make numbers comparable with those of other projects.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import commands, inspection, results, schedule, setting
from benchmarks.commands import CommandError
from benchmarks.configurations import Configuration
from benchmarks.errors import exit_status
from benchmarks.results import Record
from benchmarks.setting import BenchmarkSetting

TASK = "random"


def as_record(report: dict[str, Any], arm: str, batch: int, repeat: int, output_tokens: int) -> Record:
    """Turns the report of `vllm bench latency` into a record.

    Args:
        report: Its JSON.
        arm: The arm.
        batch: Prompts of a batch.
        repeat: Number of the repeat.
        output_tokens: Tokens of each answer.

    Returns:
        The record of all iterations together, with the seconds of each in its details.
    """
    latencies = report["latencies"]
    return Record(
        arm=arm,
        task=TASK,
        batch=batch,
        repeat=repeat,
        engine_group=0,
        prompts=[],
        tokens=batch * output_tokens * len(latencies),
        seconds=sum(latencies),
        details={"latencies": latencies},
    )


def measure(what: BenchmarkSetting, arm: Configuration, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command once.

    Args:
        what: What all arms share.
        arm: The arm.
        batch: Prompts of a batch.
        given: The command line.

    Returns:
        Its report.

    Raises:
        CommandError: If it fails.
    """
    output = what.folder / "bench-latency.json"
    sizes = ["--input-len", str(given.input_tokens), "--output-len", str(what.max_tokens), "--batch-size", str(batch)]
    sizes += ["--num-iters", str(given.iterations), "--num-iters-warmup", str(given.warm_up_iterations)]
    options = commands.options(what.engine_options(arm))
    log = what.folder / f"{arm.name}.log"
    log.unlink(missing_ok=True)
    commands.run(["bench", "latency", "--model", what.model, *options, *sizes, "--output-json", str(output)], log)
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    output.unlink()
    return report


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status: 1 if an arm failed.

    Raises:
        BenchmarkError: If something is missing or vLLM alone fails.
    """
    commands.require_vllm()
    print(f"looking at {given.model} ...", flush=True)
    what = setting.prepare(given, with_prompts=False)
    result = setting.new_result("latency", what, given)
    result.provenance["sampling"] = {"temperature": 1.0, "ignore_eos": True, "max_tokens": what.max_tokens}
    result.provenance["input_tokens"] = given.input_tokens
    arms = setting.usable(what.arms)
    for repeat in range(what.repeats):
        for arm in schedule.rotated(arms, repeat):
            try:
                for batch in what.batches:
                    report = measure(what, arm, batch, given)
                    record = as_record(report, arm.name, batch, repeat, what.max_tokens)
                    result.records.append(record)
                    speed = record.tokens / record.seconds
                    print(
                        f"repeat {repeat + 1}/{what.repeats}: {arm.name}, batch {batch}: {speed:.1f} tokens/s",
                        flush=True,
                    )
                line = commands.start_up_line(what.folder / f"{arm.name}.log")
                extra = inspection.extra_memory_bytes(arm, line)
                result.arms[arm.name].update({"start_up_line": line, "extra_memory_bytes": extra})
            except CommandError as error:
                arms.remove(arm)
                setting.fail(result, arm, what.folder, error)
            result.write(what.folder / results.FILE)
    print(f"{what.folder / results.FILE}: {len(result.records)} records", flush=True)
    return int(setting.any_failed(result))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.latency", description="Runs `vllm bench latency` for each arm.")
    setting.add_arguments(parser)
    positive = setting.positive
    parser.add_argument("--input-tokens", type=positive, default=128, help="of a prompt (default: %(default)s)")
    parser.add_argument("--max-tokens", type=positive, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--iterations", type=positive, default=3, help="in a repeat (default: %(default)s)")
    parser.add_argument("--warm-up-iterations", type=positive, default=1, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 1 after a failure, 130 after an interruption.
    """
    return exit_status(functools.partial(run, parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
