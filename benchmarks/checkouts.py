"""Compares two checkouts of the project, for example before and after a change: `python -m benchmarks.checkouts --before FOLDER`.

An engine of the other checkout and one of this take turns on the same prompts with the same options. Both answer everything
from the prompt on; the time to the first token is measured apart, on random prompts.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from benchmarks import prompts
from benchmarks.configurations import BASELINE, Configuration, choose
from benchmarks.errors import BenchmarkError, exit_status
from benchmarks.setting import not_negative, positive
from vllm_sirius.measuring.engine import Answers, Engine, EngineError
from vllm_sirius.measuring.machine import describe_machine
from vllm_sirius.measuring.side_by_side import PAUSE_SECONDS, WARM_UP_TOKENS, engine_options, rounded_length

ROOT = Path(__file__).resolve().parents[1]
PROMPT_LENGTHS = (64, 256, 600)
"""Tokens of the random prompts."""
TOKEN_IDS = range(1000, 30_000)
"""Tokens that they are made of; vocabularies of real models have them."""

Engines = dict[str, Engine]


def ratios(rounds: Sequence[tuple[Answers, Answers]]) -> str:
    """How much faster the second engine was.

    Args:
        rounds: Answers of both engines, round by round.

    Returns:
        Median and quartiles of before over after.
    """
    found = [before.seconds / after.seconds for before, after in rounds]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return f"{middle:.3f} ({low:.3f}-{high:.3f}, {len(found)} turns)"


def drafting(answers: Sequence[Answers]) -> str:
    """What an engine drafted: a change in speed may be one in this.

    Args:
        answers: Of one engine.

    Returns:
        Verification passes with drafts, tokens drafted for each of them, and tokens accepted of those.
    """
    passes = sum(each.num_drafts for each in answers)
    drafted = sum(each.num_draft_tokens for each in answers) / max(passes, 1)
    accepted = sum(each.num_accepted_tokens for each in answers) / max(passes, 1)
    return f"{passes} passes, {drafted:.2f} drafted, {accepted:.2f} accepted"


def _by_turns(engines: Engines, token_ids: list[int], max_tokens: int, number: int) -> tuple[Answers, Answers]:
    """Answers of both engines to one prompt; who begins changes with the number of the round."""
    answers = {}
    for name in list(engines) if number % 2 == 0 else list(reversed(engines)):
        time.sleep(PAUSE_SECONDS)
        answers[name] = engines[name].generate([token_ids], max_tokens, ignore_eos=True)
    return answers["before"], answers["after"]


def compare(engines: Engines, found: dict[str, list[prompts.Prompt]], given: argparse.Namespace) -> None:
    """Lets both engines answer, and prints what came of it.

    Args:
        engines: ``before`` and ``after``.
        found: The prompts of each task.
        given: The options of the program.
    """
    for engine in engines.values():
        for task in found.values():
            engine.generate([task[0].token_ids], WARM_UP_TOKENS, ignore_eos=True)
    for name, task in found.items():
        rounds = [prompt.token_ids for _ in range(given.repeats) for prompt in task]
        taken = [_by_turns(engines, token_ids, given.max_tokens, number) for number, token_ids in enumerate(rounds)]
        print(f"  {name}: ratio {ratios(taken)}", flush=True)
        for side, answers in zip(("before", "after"), zip(*taken, strict=True), strict=True):
            rate = sum(each.num_tokens for each in answers) / sum(each.seconds for each in answers)
            print(f"    {side}: {rate:.1f} tokens/s; {drafting(answers)}", flush=True)
        same = sum(before.token_ids == after.token_ids for before, after in taken)
        print(f"    {same} of {len(taken)} answers are the same", flush=True)
    for length in PROMPT_LENGTHS:
        # Each prompt once: a second time the prefix cache would hold it, were it on.
        draw = random.Random(length)
        texts = [draw.choices(TOKEN_IDS, k=length) for _ in range(2 * given.repeats)]
        taken = [_by_turns(engines, token_ids, 1, number) for number, token_ids in enumerate(texts)]
        print(f"  first token after {length} tokens: ratio {ratios(taken)}", flush=True)


def _start(arm: Configuration, checkout: Path, log: Path, given: argparse.Namespace, longest: int) -> Engine:
    options = engine_options(
        given.model,
        given.dtype,
        rounded_length(longest),
        8,
        given.kv_cache_memory_bytes,
        enforce_eager=not arm.compiled,
    )
    if arm.speculative_config:
        options["speculative_config"] = dict(arm.speculative_config)
    try:
        return Engine(options, log, checkout)
    except EngineError as error:
        raise BenchmarkError(f"{arm.name} of {checkout}: {error}") from error


def run(given: argparse.Namespace) -> int:
    """Runs the comparison.

    Args:
        given: The options of the program.

    Returns:
        The exit status.

    Raises:
        BenchmarkError: If a prompt, a checkout or an engine is missing.
    """
    before = given.before.resolve()
    if not (before / "vllm_sirius" / "measuring" / "engine.py").is_file():
        raise BenchmarkError(
            f"--before {given.before}: this is no checkout of the project whose engines can be measured"
        )
    if any(name.startswith("draft-model") for name in given.arms):
        raise BenchmarkError("--arms draft-model: checkouts are compared by what they change, which no draft model is")
    arms = choose(given.arms, given.config, None, given.compiled)
    found = prompts.collect(given.model, given.data, prompts.TASKS, given.num_prompts, given.offset)
    longest = max(len(prompt.token_ids) for task in found.values() for prompt in task)
    longest = max(longest + given.max_tokens, max(PROMPT_LENGTHS)) + WARM_UP_TOKENS
    machine = describe_machine()
    print(
        f"{machine['cores']} cores of {machine['cpu']}, {machine['vllm']}; ratio: after over before",
        flush=True,
    )
    sides = [("before", before), ("after", ROOT)]
    # Kept: an error names a file in it.
    folder = given.output or Path(tempfile.mkdtemp(prefix="sirius-checkouts-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"logs of the engines: {folder}", flush=True)
    for arm in arms:
        if arm.name == BASELINE and BASELINE not in given.arms:
            continue
        with ExitStack() as stack:
            engines = {}
            for name, checkout in reversed(sides) if given.start_after_first else sides:
                log = folder / f"{arm.name}-{name}.log"
                engines[name] = stack.enter_context(closing(_start(arm, checkout, log, given, longest)))
            print(f"{arm.name}:", flush=True)
            try:
                compare(engines, found, given)
            except EngineError as error:
                raise BenchmarkError(str(error)) from error
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Args:
        arguments: The arguments; those of the process by default.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.checkouts", description="Compares two checkouts of the project.")
    parser.add_argument("--before", required=True, type=Path, metavar="FOLDER", help="the other checkout")
    parser.add_argument("--model", required=True, help="path or hub name")
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", default=["default"], metavar="ARM", help="arms of the catalogue")
    parser.add_argument("--config", nargs="+", default=[], metavar="NAME=JSON", help="further arms")
    parser.add_argument("--compiled", action="store_true", help="compile the models")
    parser.add_argument("--num-prompts", type=positive, default=2, metavar="N", help="of each data set")
    parser.add_argument(
        "--offset", type=not_negative, default=0, metavar="N", help="questions to leave out at the start"
    )
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="of an answer")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="of everything")
    parser.add_argument("--data", type=Path, default=prompts.DATA, help="folder of the data sets")
    parser.add_argument(
        "--start-after-first", action="store_true", help="start this checkout's engine first: it may find better memory"
    )
    parser.add_argument("--kv-cache-memory-bytes", type=positive, default=1 << 28, metavar="N", help="of an engine")
    parser.add_argument("--output", type=Path, help="folder of the engines' logs (default: a new one)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program.

    Args:
        arguments: The command line; that of the process by default.

    Returns:
        The exit status.
    """
    return exit_status(functools.partial(run, parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
