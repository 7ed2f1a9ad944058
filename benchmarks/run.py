"""Measures arms side by side on real prompts: `python -m benchmarks.run --model PATH --arms NAME...`.

Every arm is an engine of its own. All engines of a group stay loaded, and each batch of prompts is answered by each of
them before the next batch, in rotating order, so that what else the machine does falls on all arms alike.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import inspection, results, schedule, setting
from benchmarks.answers import is_correct
from benchmarks.configurations import Configuration
from benchmarks.errors import exit_status
from benchmarks.prompts import WARM_UP_QUESTION, Prompt
from benchmarks.results import Record, Result
from benchmarks.setting import BenchmarkSetting
from vllm_sirius.measuring import memory
from vllm_sirius.measuring.engine import Answers, Engine, EngineError
from vllm_sirius.measuring.prompts import tokenize
from vllm_sirius.measuring.side_by_side import PAUSE_SECONDS, WARM_UP_TOKENS

Scorer = Callable[[Sequence[Prompt], Answers], list[bool]]


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def plan_groups(what: BenchmarkSetting, arms: Sequence[Configuration]) -> list[list[Configuration]]:
    """Divides the arms into groups whose engines fit into memory side by side.

    Args:
        what: What all arms share.
        arms: The arms.

    Returns:
        The groups; vLLM alone is in each.

    Raises:
        BenchmarkError: If an arm does not fit beside vLLM alone.
    """
    cache = what.engine["kv_cache_memory_bytes"]
    step_bytes = what.inspection.step_bytes
    sizes = {
        arm.name: memory.engine_bytes(
            what.model, step_bytes, cache, inspection.extra_bytes(arm, what.inspection), arm.compiled
        )
        for arm in arms
    }
    alone = {arm.name: sizes[arm.name] for arm in arms if arm.alone}
    others = {arm.name: sizes[arm.name] for arm in arms if not arm.alone}
    available = memory.available_bytes()
    groups = schedule.split_by_memory(alone, others, available)
    say(
        f"  {len(arms)} engines need about {sum(sizes.values()) / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are "
        f"available: {len(groups)} group(s)"
    )
    by_name = {arm.name: arm for arm in arms}
    return [[by_name[name] for name in group] for group in groups]


def start_engines(
    what: BenchmarkSetting, group: Sequence[Configuration], result: Result, costs: bool, stack: ExitStack
) -> dict[str, Engine]:
    """Starts the engines of a group and warms each up with one prompt, then with the largest batch.

    Args:
        what: What all arms share.
        group: The arms.
        result: Takes start-up lines, or the reason why an engine did not start.
        costs: Whether engines of Sirius measure their own steps.
        stack: Ends the engines.

    Returns:
        The engines that run, by arm.

    Raises:
        BenchmarkError: If vLLM alone does not start.
    """
    engines = {}
    warm_up = tokenize(what.model, [WARM_UP_QUESTION])
    for arm in group:
        say(f"starting {arm.name} ...")
        started = time.monotonic()
        try:
            engine = Engine(what.engine_options(arm), what.folder / f"{arm.name}.log")
            stack.callback(engine.close)
            for size in sorted({1, what.batches[-1]}):
                engine.generate(warm_up * size, WARM_UP_TOKENS)
            report = describe(arm, engine, costs)
        except EngineError as error:
            setting.fail(result, arm, what.folder, error)
            continue
        result.arms[arm.name].update(report)
        engines[arm.name] = engine
        say(f"  ready after {time.monotonic() - started:.0f} s {report['start_up_line']}")
    return engines


def describe(arm: Configuration, engine: Engine, costs: bool) -> dict[str, Any]:
    """What an engine says about itself.

    Args:
        arm: Its arm.
        engine: The engine.
        costs: Whether an engine of Sirius measures its own steps.

    Returns:
        Start-up line, extra memory and, for Sirius, the measured seconds of its steps, or why there are none.
    """
    line = engine.start_up_line()
    report: dict[str, Any] = {
        "start_up_line": line,
        "extra_memory_bytes": inspection.extra_memory_bytes(arm, line),
    }
    if costs and arm.sirius is not None:
        try:
            report["costs"] = engine.costs()
        except EngineError as error:
            # The arm can be measured all the same.
            say(f"  {arm.name}: no costs of single steps, {error}")
            report["costs_missing"] = str(error).partition(" (its log")[0]
    return report


def measure(
    what: BenchmarkSetting, group: int, engines: dict[str, Engine], result: Result, score: Scorer | None
) -> None:
    """Lets every engine of a group answer every batch, and writes the results after each round.

    Args:
        what: What all arms share.
        group: Number of the group, from 0.
        engines: The engines by arm; one that stops is dropped.
        result: Takes the records.
        score: Judges answers; ``None`` to leave that out.

    Raises:
        BenchmarkError: If vLLM alone stops.
    """
    by_name = {arm.name: arm for arm in what.arms}
    rounds = [
        (repeat, size, task, batch)
        for repeat in range(what.repeats)
        for size in what.batches
        for task, prompts in what.prompts.items()
        for batch in schedule.batches(prompts, size)[: what.most_batches]
    ]
    for number, (repeat, size, task, batch) in enumerate(rounds):
        speeds = {}
        for name in schedule.rotated(list(engines), number):
            time.sleep(PAUSE_SECONDS)
            try:
                answers = engines[name].generate([prompt.token_ids for prompt in batch], what.max_tokens)
            except EngineError as error:
                del engines[name]
                setting.fail(result, by_name[name], what.folder, error)
                continue
            correct = score(batch, answers) if score else []
            result.records.append(_record(name, size, repeat, group, batch, answers, correct))
            speeds[name] = answers.num_tokens / answers.seconds
        result.write(what.folder / results.FILE)
        parts = [f"{name} {speeds[name]:.1f}" for name in engines if name in speeds]
        say(f"round {number + 1}/{len(rounds)} ({task}, batch {size}): tokens/s {', '.join(parts)}")


def _record(
    arm: str, size: int, repeat: int, group: int, batch: Sequence[Prompt], answers: Answers, correct: list[bool]
) -> Record:
    return Record(
        arm=arm,
        task=batch[0].task,
        batch=size,
        repeat=repeat,
        engine_group=group,
        prompts=[prompt.index for prompt in batch],
        tokens=answers.num_tokens,
        seconds=answers.seconds,
        num_drafts=answers.num_drafts,
        num_draft_tokens=answers.num_draft_tokens,
        num_accepted_tokens=answers.num_accepted_tokens,
        accepted_by_position=list(answers.accepted_by_position),
        token_ids=answers.token_ids,
        correct=correct,
    )


def scorer(model: str) -> Scorer:
    """Makes the judge of answers to word problems.

    Args:
        model: Path or hub name; its tokenizer is loaded.

    Returns:
        A function of a batch and its answers; it gives nothing for tasks that a number cannot score.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def score(batch: Sequence[Prompt], answers: Answers) -> list[bool]:
        if not batch[0].gold:
            return []
        texts = [tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in answers.token_ids]
        return [is_correct(text, prompt.gold) for text, prompt in zip(texts, batch, strict=True)]

    return score


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status: 1 if an arm failed.

    Raises:
        BenchmarkError: If something is missing or vLLM alone fails.
    """
    started = time.monotonic()
    say(f"looking at {given.model} ...")
    what = setting.prepare(given)
    result = setting.new_result("run", what, given)
    score = scorer(what.model) if given.answers else None
    groups = plan_groups(what, setting.usable(what.arms))
    result.provenance["groups"] = [[arm.name for arm in group] for group in groups]
    for number, group in enumerate(groups):
        with ExitStack() as stack:
            engines = start_engines(what, group, result, given.costs, stack)
            measure(what, number, engines, result, score)
            say("ending the engines ...")
    say(f"{what.folder / results.FILE}: {len(result.records)} records; {time.monotonic() - started:.0f} s in all")
    say(f"next: python -m benchmarks.compare {what.folder}")
    return int(setting.any_failed(result))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.run", description="Measures arms side by side on real prompts.")
    setting.add_arguments(parser)
    setting.add_prompt_arguments(parser)
    parser.add_argument(
        "--most-batches",
        type=setting.positive,
        metavar="N",
        help="of a task and batch size in a repeat, at most so many batches (default: as many as the prompts make)",
    )
    parser.add_argument("--answers", action="store_true", help="score GSM8K answers by their final number")
    parser.add_argument(
        "--costs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let engines of Sirius measure the seconds of their own steps (default: yes)",
    )
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
