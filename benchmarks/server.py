"""Measures live servers: `vllm serve` for each arm, asked by `vllm bench serve`.

    python -m benchmarks.server --model PATH --arms NAME... --batch 1 4

Servers run one after the other: each repeat starts every arm's server again, in rotating order. Requests come as fast as
the server takes them; the batch size is the most that are under way at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import commands, inspection, results, schedule, setting
from benchmarks.commands import CommandError
from benchmarks.configurations import Configuration
from benchmarks.errors import BenchmarkError, exit_status
from benchmarks.prompts import Prompt
from benchmarks.results import Record
from benchmarks.setting import BenchmarkSetting

START_SECONDS = 900
STOP_SECONDS = 60
MOST_PROMPT_TOKENS, MOST_TOKENS = 1024, 2048
"""`vllm bench serve` leaves out longer prompts of the format in which it gets them."""

KEPT = ("ttft", "tpot", "itl")
"""Latencies of its report that are kept: time to the first token, per further token, between chunks; milliseconds."""


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def check_lengths(prompts: Sequence[Prompt], max_tokens: int) -> None:
    """Refuses prompts that `vllm bench serve` would leave out.

    Args:
        prompts: The prompts.
        max_tokens: Most tokens per answer.

    Raises:
        BenchmarkError: If a prompt is too long.
    """
    for prompt in prompts:
        length = len(prompt.token_ids)
        if length > MOST_PROMPT_TOKENS or length + max_tokens > MOST_TOKENS:
            raise BenchmarkError(
                f"--max-tokens {max_tokens}: prompt {prompt.index} of {prompt.task} has {length} tokens, and `vllm bench serve` "
                f"takes at most {MOST_PROMPT_TOKENS} and {MOST_TOKENS} with the answer; lower it or choose another --offset"
            )


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Writes prompts as `vllm bench serve` reads them without further packages.

    Args:
        prompts: The prompts.
        path: JSON file: conversations of a question and an answer, which is not used.
    """
    turns = [{"conversations": [{"value": prompt.text}, {"value": "unused"}]} for prompt in prompts]
    path.write_text(json.dumps(turns), encoding="utf-8")


def as_record(report: dict[str, Any], arm: str, task: str, batch: int, repeat: int, prompts: list[int]) -> Record:
    """Turns the report of `vllm bench serve` into a record.

    Args:
        report: Its JSON, with details.
        arm: The arm.
        task: The data set.
        batch: Most requests under way.
        repeat: Number of the repeat.
        prompts: Places of the prompts in the data set.

    Returns:
        The record; its answers are texts.
    """
    drafts = report.get("spec_decode_num_drafts", 0)
    rates = report.get("spec_decode_per_position_acceptance_rates", [])
    return Record(
        arm=arm,
        task=task,
        batch=batch,
        repeat=repeat,
        engine_group=0,
        prompts=prompts,
        tokens=report["total_output_tokens"],
        seconds=report["duration"],
        num_drafts=drafts,
        num_draft_tokens=report.get("spec_decode_draft_tokens", 0),
        num_accepted_tokens=report.get("spec_decode_accepted_tokens", 0),
        accepted_by_position=[round(rate * drafts) for rate in rates],
        texts=report["generated_texts"],
        details={key: value for key, value in report.items() if key.endswith(tuple(f"{name}_ms" for name in KEPT))},
    )


@contextlib.contextmanager
def server(what: BenchmarkSetting, arm: Configuration, log: Path) -> Iterator[str]:
    """Runs `vllm serve` on a free port of the loopback interface while the block lasts.

    Args:
        what: What all arms share.
        arm: The arm.
        log: File that takes what the server prints.

    Yields:
        Its URL.

    Raises:
        CommandError: If the server does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [commands.VLLM, "serve", what.model, *commands.options(what.engine_options(arm))]
    # Defaults of the model's own generation_config.json, such as penalties, would change answers and speed.
    command += ["--generation-config", "vllm", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=commands.environment())
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CommandError(f"vllm serve ended: {commands.last_line(log)}; its log is {log}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(1)
    raise CommandError(f"vllm serve gave no answer within {START_SECONDS} s; its log is {log}")


def ask(what: BenchmarkSetting, url: str, task: str, batch: int, chat: bool, log: Path) -> dict[str, Any]:
    """Runs `vllm bench serve` with the prompts of a task.

    Args:
        what: What all arms share.
        url: The server's.
        task: The data set.
        batch: Most requests under way.
        chat: Whether the model has a chat template, which the server then applies.
        log: File that takes what the command prints.

    Returns:
        Its report.

    Raises:
        CommandError: If it or one of its requests fails.
    """
    number = len(what.prompts[task])
    door = ("openai-chat", "/v1/chat/completions") if chat else ("openai", "/v1/completions")
    report = what.folder / "bench-serve.json"
    data = ["--dataset-name", "sharegpt", "--dataset-path", str(what.folder / f"{task}.json"), "--disable-shuffle"]
    traffic = [
        "--num-prompts",
        str(number),
        "--no-oversample",
        "--max-concurrency",
        str(batch),
        "--request-rate",
        "inf",
    ]
    sizes = ["--sharegpt-output-len", str(what.max_tokens), "--num-warmups", str(batch), "--temperature", "0"]
    output = ["--save-result", "--save-detailed", "--result-dir", str(what.folder), "--result-filename", report.name]
    where = ["--base-url", url, "--model", what.model, "--backend", door[0], "--endpoint", door[1]]
    commands.run(["bench", "serve", *where, *data, *traffic, *sizes, *output, "--disable-tqdm"], log)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    if found["completed"] != number:
        raise CommandError(f"{found['completed']} of {number} requests of {task} were answered; the log is {log}")
    return found


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
    say(f"looking at {given.model} ...")
    what = setting.prepare(given)
    for task, prompts in what.prompts.items():
        check_lengths(prompts, what.max_tokens)
        write_prompts(prompts, what.folder / f"{task}.json")
    result = setting.new_result("server", what, given)
    chat = _has_chat_template(what.model)
    arms = setting.usable(what.arms)
    for repeat in range(what.repeats):
        for arm in schedule.rotated(arms, repeat):
            say(f"repeat {repeat + 1}/{what.repeats}: {arm.name} ...")
            log = what.folder / f"{arm.name}.log"
            try:
                with server(what, arm, log) as url:
                    result.arms[arm.name].update(_describe(arm, log))
                    result.records += _measure(what, arm, url, repeat, chat)
            except CommandError as error:
                arms.remove(arm)
                setting.fail(result, arm, what.folder, error)
            result.write(what.folder / results.FILE)
    say(f"{what.folder / results.FILE}: {len(result.records)} records")
    return int(setting.any_failed(result))


def _measure(what: BenchmarkSetting, arm: Configuration, url: str, repeat: int, chat: bool) -> list[Record]:
    """Every task at every batch size, against one server."""
    records = []
    for batch in what.batches:
        for task, prompts in what.prompts.items():
            report = ask(what, url, task, batch, chat, what.folder / f"{arm.name}.bench.log")
            places = [prompt.index for prompt in prompts]
            records.append(as_record(report, arm.name, task, batch, repeat, places))
            say(f"  {task}, {batch} at a time: {records[-1].tokens / records[-1].seconds:.1f} tokens/s")
    return records


def _describe(arm: Configuration, log: Path) -> dict[str, Any]:
    line = commands.start_up_line(log)
    return {"start_up_line": line, "extra_memory_bytes": inspection.extra_memory_bytes(arm, line)}


def _has_chat_template(model: str) -> bool:
    from transformers import AutoTokenizer

    return bool(AutoTokenizer.from_pretrained(model).chat_template)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.server", description="Measures live servers, arm after arm.")
    setting.add_arguments(parser)
    setting.add_prompt_arguments(parser)
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
