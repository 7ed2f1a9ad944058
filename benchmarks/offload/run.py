"""Compares engines whose weights do not fit: `python -m benchmarks.offload.run --model FOLDER --gb-per-second 1`.

The arms run one after the other, each as a process of its own in a cage of control groups that bounds its memory, page
cache included, and the rate of the disk.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.errors import exit_status
from benchmarks.offload import arms, disk_rate, page_cache, setting
from benchmarks.offload.answering import AnsweringError
from benchmarks.offload.arms import Answerer, Arm
from benchmarks.offload.cage import Cage
from benchmarks.offload.report import report
from benchmarks.offload.setting import OffloadSetting
from benchmarks.prompts import WARM_UP_QUESTION, Prompt
from benchmarks.results import Record, Result
from vllm_sirius.measuring.engine import Answers, EngineError
from vllm_sirius.measuring.prompts import tokenize

WARM_UP_TOKENS, SLOW_WARM_UP_TOKENS = 32, 2
OUT_OF_MEMORY = "out of memory"
FAILURES = (EngineError, AnsweringError)


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def make_files(what: OffloadSetting, result: Result) -> None:
    """Makes what arms read, before the rate is bounded: the file that Sirius streams, and the models of llama.cpp.

    Sirius makes its file inside of the bound of memory, because that is what it promises.

    Args:
        what: What is measured.
        result: Takes how long it took and how much memory.

    Raises:
        BenchmarkError: If llama.cpp's models cannot be made.
    """
    ours = [arm for arm in what.arms if arm.name in (arms.OURS, arms.OFF)]
    if ours and not weight_files(ours[0]):
        say("writing the file that Sirius streams ...")
        started = time.monotonic()
        log = what.folder / "build.log"
        with Cage(what.limits(0)) as cage:
            status = results.MEASURED
            try:
                ours[0].start(what.prefix(cage, 0), log).close()
            except FAILURES as error:
                # The arms that read no such file can be measured all the same; this one will say why it cannot.
                status = f"{results.FAILED}: {str(error).splitlines()[0].replace(str(what.folder), '.')}"
            seconds = time.monotonic() - started
            result.provenance["build"] = {"status": status, "seconds": seconds, **cage.report().as_dict()}
            say(f"  {status} after {seconds:.0f} s; {cage.report()}")
    if any(arm.name.startswith(arms.LLAMA) and not arm.missing for arm in what.arms):
        say("making llama.cpp's models, unless they are there ...")
        what.llama.prepare(Path(what.sizes.model), what.folder / "llama-models.log")


def weight_files(arm: Arm) -> list[Path]:
    """The files that an arm reads; a folder stands for the files in it that Sirius streams.

    Args:
        arm: The arm.
    """
    return [file for place in arm.files for file in page_cache.files_of(place, "*.weights")]


def measure_disk(what: OffloadSetting, result: Result, rate: float) -> None:
    """Reads plainly in the cage, so that a disk slower than the bound shows.

    Args:
        what: What is measured.
        result: Takes the rate.
        rate: The bound in GB/s.
    """
    files = max((weight_files(arm) for arm in what.arms if not arm.missing), key=len, default=[])
    if not files:
        return
    file = max(files, key=lambda each: each.stat().st_size)
    try:
        with Cage(what.limits(rate)) as cage:
            found = disk_rate.measure(file, cage.prefix)
    except AnsweringError as error:
        say(f"  {error}")
        return
    result.provenance["disk_bytes_per_second"][f"{rate:g}"] = found
    say(f"plain reads at a bound of {rate:g} GB/s: {found / 1e9:.2f} GB/s")


def run_arm(what: OffloadSetting, arm: Arm, rate: float, result: Result) -> None:
    """Starts an arm in a cage and lets it answer everything.

    Args:
        what: What is measured.
        arm: The arm.
        rate: GB/s of the disk.
        result: Takes records, and what the kernel says of the cage.
    """
    say(f"{arm.name} at {rate:g} GB/s ({arm.about}) ...")
    state: dict[str, Any] = {"cached_bytes_before": page_cache.drop(weight_files(arm)), "status": results.MEASURED}
    result.arms[arm.name]["rates"][f"{rate:g}"] = state
    log = what.folder / f"{arm.name}-{rate:g}.log"
    limits = what.limits(rate, arm)
    state["memory_bytes"] = limits.memory_bytes
    started = time.monotonic()
    with Cage(limits) as cage:
        try:
            with closing(arm.start(what.prefix(cage, rate), log)) as answerer:
                _warm_up(what, arm, answerer)
                state["start_seconds"] = time.monotonic() - started
                say(f"  ready after {state['start_seconds']:.0f} s")
                _answer_all(what, arm, answerer, rate, cage, result)
                if arm.drafts and not has_drafted(arm, rate, result):
                    state["status"] = f"{results.FAILED}: it drafted nothing, so that its speed says nothing of drafts"
                if arm.name == arms.OURS and isinstance(answerer, arms.EngineAnswers):
                    state["draft_seconds"] = answerer.draft_seconds()
        except FAILURES as error:
            state["status"] = f"{results.FAILED}: {str(error).splitlines()[0].replace(str(what.folder), '.')}"
        found = cage.report()
        if found.oom_kills and state["status"] != results.MEASURED:
            state["status"] = f"{OUT_OF_MEMORY}: the kernel ended it {time.monotonic() - started:.0f} s after its start"
            if not arm.may_run_out:
                state["status"] = f"{results.FAILED}: {state['status']}"
        state.update(found.as_dict())
    say(f"  {state['status']}; {found}")


def _warm_up(what: OffloadSetting, arm: Arm, answerer: Answerer) -> None:
    (prompt,) = tokenize(what.sizes.model, [WARM_UP_QUESTION])
    answerer.answer(prompt, WARM_UP_TOKENS if arm.drafts else SLOW_WARM_UP_TOKENS)


def _answer_all(what: OffloadSetting, arm: Arm, answerer: Answerer, rate: float, cage: Cage, result: Result) -> None:
    most = what.max_tokens if arm.drafts else what.slow_max_tokens
    rounds = [(repeat, p) for repeat in range(what.repeats) for each in what.prompts.values() for p in each]
    for repeat, prompt in rounds:
        before = cage.read_bytes()
        answers = answerer.answer(prompt.token_ids, most)
        after = cage.read_bytes()
        read = None if before is None or after is None else after - before
        result.records.append(as_record(arm.name, prompt, repeat, what.rates.index(rate), answers, rate, read))
        result.write(what.folder / results.FILE)
        say(
            f"  {prompt.task} {prompt.index}, repeat {repeat + 1}: {answers.num_tokens / answers.seconds:.3g} tokens/s "
            f"({answers.num_tokens} in {answers.seconds:.1f} s)"
        )


def has_drafted(arm: Arm, rate: float, result: Result) -> bool:
    """Whether an arm drafted anything.

    Args:
        arm: The arm.
        rate: GB/s of the disk.
        result: Its answers.
    """
    return any(r.num_draft_tokens for r in result.records if r.arm == arm.name and r.details["gb_per_second"] == rate)


def as_record(
    arm: str, prompt: Prompt, repeat: int, group: int, answers: Answers, rate: float, read_bytes: int | None
) -> Record:
    """One answer.

    Args:
        arm: The arm.
        prompt: The prompt.
        repeat: Number of the repeat.
        group: Number of the rate.
        answers: The answer.
        rate: GB/s of the disk.
        read_bytes: What was read from the disk meanwhile.
    """
    return Record(
        arm=arm,
        task=prompt.task,
        batch=1,
        repeat=repeat,
        engine_group=group,
        prompts=[prompt.index],
        tokens=answers.num_tokens,
        seconds=answers.seconds,
        num_drafts=answers.num_drafts,
        num_draft_tokens=answers.num_draft_tokens,
        num_accepted_tokens=answers.num_accepted_tokens,
        accepted_by_position=list(answers.accepted_by_position),
        token_ids=answers.token_ids,
        details={"gb_per_second": rate, "read_bytes": read_bytes},
    )


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status: 1 if an arm failed; running out of memory, where that was to be shown, is no failure.

    Raises:
        BenchmarkError: If something is missing.
    """
    what = setting.prepare(given)
    result = setting.new_result(what)
    usable = [arm for arm in what.arms if not arm.missing]
    for arm in what.arms:
        if arm.missing:
            say(f"{arm.name}: left out, {arm.missing}")
    make_files(what, result)
    for rate in what.rates:
        measure_disk(what, result, rate)
        for arm in usable:
            run_arm(what, arm, rate, result)
            result.write(what.folder / results.FILE)
    say(f"\n{report(result)}\n\n{what.folder / results.FILE}: {len(result.records)} records")
    states = [state["status"] for arm in result.arms.values() for state in arm["rates"].values()]
    return int(any(status.startswith(results.FAILED) for status in states))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 1 after a failure, 130 after an interruption.
    """
    parser = argparse.ArgumentParser(
        prog="benchmarks.offload.run", description="Compares engines whose weights do not fit into memory."
    )
    setting.add_arguments(parser)
    return exit_status(functools.partial(run, parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
