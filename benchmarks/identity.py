"""Checks that Sirius leaves answers alone: `python -m benchmarks.identity --model PATH`.

*Identity*: vLLM alone and an engine with Sirius answer the same prompts, one at a time and in batches, eager and compiled,
greedily and drawn with a seed. In float32 every token must be the same.

*Repeatability*, with ``--runs``: one engine with Sirius answers the prompts several times, alone in another order each
time and in batches, then with drafting off (``sirius: off``). Counted are the prompts whose answers are all the same.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import prompts, setting
from benchmarks.compare import table
from benchmarks.errors import BenchmarkError, exit_status
from vllm_sirius.config import MAX_KERNEL_SIZE
from vllm_sirius.measuring.engine import Engine, EngineError
from vllm_sirius.measuring.prompts import tokenize
from vllm_sirius.measuring.side_by_side import engine_options, rounded_length

MODES = ("eager", "compiled")
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.8}}
"""Seeded requests have a seed of their own, the number of the prompt."""

OFF = {"extra_args": {"sirius": "off"}}
IDENTITY_COLUMNS = ("engine", "batch", "sampling", "identical", "first difference", "drafted", "accepted")
REPEAT_COLUMNS = ("engine", "sampling", "all runs", "runs at each batch", "all runs and off", "off at each batch")
NONE = "-"

OWN_QUESTIONS = (
    "A baker makes {n} trays of 8 rolls and sells 70 rolls. How many rolls are left? Explain each step.",
    "Write a Python function that returns the {n} largest numbers of a list.",
    "Tom has {n} times as many stamps as Ann. Together they have 480 stamps. How many has Tom? Explain each step.",
    "Write a Python function that splits a text into lines of at most {n} letters without cutting a word.",
    "A train travels {n} km in 45 minutes. How far does it travel in 2 hours at the same speed?",
    "Write a short story about a fox, a river and {n} stones.",
)
"""Stand in where the data sets are not at hand."""


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves another one.

    Attributes:
        prompt: Number of the prompt.
        token: First place at which the answers differ; the length of the shorter one where it is the other's start.
    """

    prompt: int
    token: int

    def __str__(self) -> str:
        """As in the table."""
        return f"prompt {self.prompt}, token {self.token}"


@dataclass
class Run:
    """Answers of one engine to all prompts, in the prompts' order.

    Attributes:
        token_ids: The answers.
        num_draft_tokens: Draft tokens that were judged meanwhile.
        num_accepted_tokens: Draft tokens that were accepted.
    """

    token_ids: list[list[int]]
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass
class Verdict:
    """What was found.

    Attributes:
        identity: Lines of the table of identity.
        repeatability: Lines of the table of repeatability.
        num_different: Answers that differ from vLLM alone's.
        idle: Engines of Sirius that accepted no draft token, so that their identity says nothing.
    """

    identity: list[list[str]] = field(default_factory=list)
    repeatability: list[list[str]] = field(default_factory=list)
    num_different: int = 0
    idle: list[str] = field(default_factory=list)


def differences(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> list[Difference]:
    """Compares answers to the same prompts.

    Args:
        ours: Token ids of each answer.
        theirs: The same of other answers.

    Returns:
        The first difference of each pair that differs.
    """
    found = []
    for prompt, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if list(one) != list(other):
            pairs = enumerate(zip(one, other, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
            found.append(Difference(prompt, place))
    return found


def share_of_equal(runs: Sequence[Sequence[Sequence[int]]]) -> str:
    """How many prompts got the same answer in all runs.

    Args:
        runs: Answers of each run.

    Returns:
        The number and the share, as in the table.
    """
    by_prompt = list(zip(*runs, strict=True))
    equal = sum(all(list(answer) == list(answers[0]) for answer in answers) for answers in by_prompt)
    return f"{equal}/{len(by_prompt)} ({equal / len(by_prompt):.1%})"


def collect(given: argparse.Namespace) -> list[list[int]]:
    """Token ids of the prompts: data sets by turns where they are at hand, otherwise questions of our own.

    Args:
        given: The command line.

    Returns:
        As many as asked for.
    """
    half = -(-given.prompts // 2)
    try:
        found = prompts.collect(given.model, given.data, prompts.TASKS, half, given.offset)
    except BenchmarkError as error:
        print(f"prompts of its own ({error})", flush=True)
        texts = [OWN_QUESTIONS[i % len(OWN_QUESTIONS)].format(n=3 + i) for i in range(given.prompts)]
        return tokenize(given.model, texts)
    pairs = zip(*found.values(), strict=True)
    return [prompt.token_ids for pair in pairs for prompt in pair][: given.prompts]


def shared_options(given: argparse.Namespace, longest: int, mode: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that vLLM alone and Sirius share.

    Args:
        given: The command line.
        longest: Tokens of the longest prompt.
        mode: ``eager`` or ``compiled``.

    Returns:
        The arguments.
    """
    room = longest + given.max_tokens + MAX_KERNEL_SIZE
    return engine_options(
        given.model,
        given.dtype,
        rounded_length(room),
        max(given.batch),
        given.kv_cache_memory_bytes,
        enforce_eager=mode == "eager",
        # Answers must be the same whether their prompts are cached or not.
        enable_prefix_caching=True,
    )


def answer(
    engine: Engine,
    token_ids: Sequence[list[int]],
    batch: int,
    max_tokens: int,
    sampling: Mapping[str, Any],
    order: Sequence[int] | None = None,
) -> Run:
    """Has an engine answer all prompts.

    Args:
        engine: The engine.
        token_ids: Prompts.
        batch: Most prompts at a time; 1 asks one after the other, more sends all and leaves batching to the engine.
        max_tokens: Most tokens of an answer.
        sampling: Of all requests; those with a temperature get their prompt's number as seed.
        order: Order in which prompts are asked; the given one by default.

    Returns:
        Their answers, in the prompts' order.
    """
    order = list(range(len(token_ids))) if order is None else list(order)
    found: list[list[int]] = [[] for _ in token_ids]
    run = Run(found)
    for places in [[place] for place in order] if batch == 1 else [order]:
        seeds = [{"seed": 1000 + place} if sampling["temperature"] else {} for place in places]
        asked = [token_ids[place] for place in places]
        answers = engine.generate(asked, max_tokens, each=seeds, **sampling)
        for place, tokens in zip(places, answers.token_ids, strict=True):
            found[place] = tokens
        run.num_draft_tokens += answers.num_draft_tokens
        run.num_accepted_tokens += answers.num_accepted_tokens
    return run


def answer_cases(engine: Engine, token_ids: Sequence[list[int]], given: argparse.Namespace) -> dict[Any, Run]:
    """Answers of an engine in every case: batch size by sampling."""
    return {
        (batch, name): answer(engine, token_ids, batch, given.max_tokens, sampling)
        for batch in given.batch
        for name, sampling in SAMPLINGS.items()
    }


def judge_identity(mode: str, alone: Mapping[Any, Run], drafted: Mapping[Any, Run], verdict: Verdict) -> None:
    """Compares the cases of two engines.

    Args:
        mode: ``eager`` or ``compiled``.
        alone: Answers of vLLM alone by batch size and sampling.
        drafted: Answers of Sirius.
        verdict: Takes the lines.
    """
    if not any(run.num_accepted_tokens for run in drafted.values()):
        verdict.idle.append(mode)
    for (batch, sampling), run in drafted.items():
        found = differences(run.token_ids, alone[batch, sampling].token_ids)
        verdict.num_different += len(found)
        count = len(run.token_ids)
        first = str(min(found, key=lambda difference: difference.token)) if found else NONE
        counts = [str(run.num_draft_tokens), str(run.num_accepted_tokens)]
        verdict.identity.append([mode, str(batch), sampling, f"{count - len(found)}/{count}", first, *counts])


def judge_repeatability(
    engine: Engine, mode: str, token_ids: Sequence[list[int]], given: argparse.Namespace, verdict: Verdict
) -> None:
    """Has an engine of Sirius answer the prompts several times.

    Runs take the batch sizes by turns, and each has an order of its own.

    Args:
        engine: The engine.
        mode: ``eager`` or ``compiled``.
        token_ids: Prompts.
        given: The command line.
        verdict: Takes the lines.
    """
    for name, sampling in SAMPLINGS.items():
        by_batch: dict[int, list[list[list[int]]]] = {batch: [] for batch in given.batch}
        for number in range(given.runs):
            started = time.monotonic()
            batch = given.batch[number % len(given.batch)]
            order = random.Random(number).sample(range(len(token_ids)), len(token_ids))
            found = answer(engine, token_ids, batch, given.max_tokens, sampling, order).token_ids
            by_batch[batch].append(found)
            parted = "; ".join(map(str, differences(found, by_batch[given.batch[0]][0]))) or "none"
            seconds = time.monotonic() - started
            print(f"  {name}, run {number + 1}, batch {batch}: {seconds:.0f} s, parts from run 1: {parted}", flush=True)
        off = [
            answer(engine, token_ids, batch, given.max_tokens, {**sampling, **OFF}).token_ids
            for batch in given.off_batch or sorted(by_batch)
        ]
        runs = [run for of_batch in by_batch.values() for run in of_batch]
        each = ", ".join(f"{batch}: {share_of_equal(of_batch)}" for batch, of_batch in by_batch.items() if of_batch)
        line = [mode, name, share_of_equal(runs), each, share_of_equal([*runs, off[0]]), share_of_equal(off)]
        verdict.repeatability.append(line)


def check_mode(mode: str, token_ids: Sequence[list[int]], given: argparse.Namespace, verdict: Verdict) -> None:
    """Carries out both checks with eager or with compiled engines, one engine at a time.

    Args:
        mode: ``eager`` or ``compiled``.
        token_ids: Prompts.
        given: The command line.
        verdict: Takes what is found.

    Raises:
        BenchmarkError: If an engine fails.
    """
    options = shared_options(given, max(map(len, token_ids)), mode)
    arms = {"vllm": options, "sirius": {**options, "speculative_config": given.config}}
    found = {}
    for arm, own in arms.items():
        if arm == "vllm" and given.only_repeatability:
            continue
        print(f"{mode} {arm} ...", flush=True)
        try:
            engine = Engine(own, given.output / f"{mode}-{arm}.log")
            try:
                if not given.only_repeatability:
                    found[arm] = answer_cases(engine, token_ids, given)
                if arm == "sirius":
                    print(f"  {engine.start_up_line()}", flush=True)
                    if given.runs:
                        judge_repeatability(engine, mode, token_ids, given, verdict)
            finally:
                engine.close()
        except EngineError as error:
            raise BenchmarkError(f"{mode} {arm}: {error}") from error
    if found:
        judge_identity(mode, found["vllm"], found["sirius"], verdict)


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status: 1 if an answer in float32 is not vLLM's own, or if an engine drafted nothing.

    Raises:
        BenchmarkError: If an engine fails.
    """
    given.output.mkdir(parents=True, exist_ok=True)
    token_ids = collect(given)
    verdict = Verdict()
    for mode in given.modes:
        check_mode(mode, token_ids, given, verdict)
    what = f"{setting.model_name(given.model)}, {given.dtype}, {len(token_ids)} prompts of {given.max_tokens} tokens"
    print(f"\n{what}, {json.dumps(given.config)}")
    if verdict.identity:
        print("\nAnswers that are vLLM alone's\n" + table([IDENTITY_COLUMNS, *verdict.identity], given.markdown))
    if verdict.repeatability:
        print(
            f"\nPrompts whose answers are all the same, {given.runs} runs\n"
            + table([REPEAT_COLUMNS, *verdict.repeatability], given.markdown)
        )
    for mode in verdict.idle:
        print(f"{mode}: no draft token was accepted, so this engine shows nothing")
    return int(bool(verdict.idle) or (given.dtype == "float32" and verdict.num_different > 0))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    number = setting.positive
    parser = argparse.ArgumentParser(prog="benchmarks.identity", description="Checks that Sirius leaves answers alone.")
    parser.add_argument("--model", required=True, help="path or hub name")
    parser.add_argument("--dtype", default="float32", help="type of the weights (default: %(default)s)")
    parser.add_argument("--prompts", type=number, default=24, metavar="N", help="default: %(default)s")
    parser.add_argument("--offset", type=int, default=0, help="prompts to leave out at the start of each data set")
    parser.add_argument("--data", type=Path, default=prompts.DATA, help="folder of the data sets")
    parser.add_argument("--max-tokens", type=number, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--batch", nargs="+", type=number, default=[1, 8], metavar="B", help="of the runs, by turns")
    parser.add_argument(
        "--off-batch", nargs="+", type=number, metavar="B", help="with drafting off (default: the same as --batch)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    parser.add_argument(
        "--config",
        type=json.loads,
        default={"method": "sirius"},
        metavar="JSON",
        help="default: %(default)s",
    )
    parser.add_argument("--runs", type=int, default=0, metavar="N", help="check repeatability over so many runs")
    parser.add_argument("--only-repeatability", action="store_true", help="leave the comparison with vLLM alone out")
    parser.add_argument("--kv-cache-memory-bytes", type=number, default=1 << 30, help="of an engine")
    parser.add_argument("--output", type=Path, default=Path("results", "identity"), help="folder of the engines' logs")
    parser.add_argument("--markdown", action="store_true", help="write Markdown")
    given = parser.parse_args(arguments)
    if given.only_repeatability and not given.runs:
        parser.error("--only-repeatability needs --runs")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, and prints what was found.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status, as `run` gives it.
    """
    return exit_status(functools.partial(run, parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
