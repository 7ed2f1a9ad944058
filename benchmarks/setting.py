"""What the programs that measure have in common: command line, checks before anything slow, provenance."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import inspection, prompts, results
from benchmarks.configurations import Configuration, choose
from benchmarks.errors import BenchmarkError
from benchmarks.prompts import Prompt
from benchmarks.results import Result
from vllm_sirius.config import MAX_KERNEL_SIZE
from vllm_sirius.measuring.inspection import Inspection
from vllm_sirius.measuring.machine import describe_machine
from vllm_sirius.measuring.side_by_side import engine_options, rounded_length

DEFAULT_ARMS = ("vllm", "vllm-compiled", "ngram", "default", "threshold")
SEQUENCE_BYTES = 64 << 20
"""KV cache for one more sequence of a batch, where the command line does not say it."""

SMALLEST_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class BenchmarkSetting:
    """The model and what all arms share.

    Attributes:
        model: Path or hub name.
        name: Its name in results.
        arms: The arms, vLLM alone first.
        engine: Arguments of `vllm.LLM`, the same for all arms.
        inspection: What is known of the model.
        prompts: The prompts of each task.
        batches: Batch sizes.
        max_tokens: Most tokens per answer.
        repeats: How often everything is measured.
        folder: Takes results and logs.
        most_batches: Most batches of a task and size in a repeat; ``None`` for all that the prompts make.
    """

    model: str
    name: str
    arms: list[Configuration]
    engine: dict[str, Any]
    inspection: Inspection
    prompts: dict[str, list[Prompt]]
    batches: list[int]
    max_tokens: int
    repeats: int
    folder: Path
    most_batches: int | None = None

    def engine_options(self, arm: Configuration) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for an arm.

        Args:
            arm: The arm.

        Returns:
            The shared arguments with the arm's own.
        """
        own = {} if arm.alone else {"speculative_config": dict(arm.speculative_config)}
        return {**self.engine, "enforce_eager": not arm.compiled, **own}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose model, arms and sizes."""
    parser.add_argument("--model", required=True, help="path or hub name")
    parser.add_argument("--draft-model", help="path or hub name for the arm draft-model")
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT_ARMS), metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--config", action="append", default=[], metavar="NAME=JSON", help="an arm of your own: its speculative config"
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="compile the model in every arm, vLLM alone included; default: as the arm says",
    )
    parser.add_argument("--repeats", type=positive, default=5, help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], metavar="B", help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights (default: %(default)s)")
    parser.add_argument("--kv-cache-memory-bytes", type=positive, help="of one engine; by default it follows --batch")
    parser.add_argument("--output", type=Path, help="folder (default: results/bench/MODEL-DATE)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --output")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose prompts."""
    parser.add_argument("--tasks", nargs="+", choices=prompts.TASKS, default=list(prompts.TASKS), help="default: all")
    parser.add_argument(
        "--num-prompts", type=positive, default=16, metavar="N", help="of a task (default: %(default)s)"
    )
    parser.add_argument("--offset", type=not_negative, default=0, help="prompts to leave out at the start of each task")
    parser.add_argument("--data", type=Path, default=prompts.DATA, help="folder of the data sets")
    parser.add_argument("--max-tokens", type=positive, default=256, help="of an answer (default: %(default)s)")


def prepare(given: argparse.Namespace, with_prompts: bool = True) -> BenchmarkSetting:
    """Checks the command line and looks at model and prompts.

    Args:
        given: Options of `add_arguments` and, with prompts, `add_prompt_arguments`.
        with_prompts: Whether prompts are read; otherwise ``max_tokens`` and ``input_tokens`` give the lengths.

    Returns:
        What all arms share.

    Raises:
        BenchmarkError: If anything is missing or contradicts itself.
    """
    arms = choose(given.arms, given.config, given.draft_model, given.compiled)
    for option, model in (("--model", given.model), ("--draft-model", given.draft_model)):
        _check_model(option, model)
    name = model_name(given.model)
    date = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = given.output or Path("results", "bench", f"{name}-{date}")
    if (folder / results.FILE).exists() and not given.overwrite:
        raise BenchmarkError(f"--output {folder}: there are results already; choose another folder or add --overwrite")
    batch_sizes = sorted(set(given.batch))
    found: dict[str, list[Prompt]] = {}
    longest = given.max_tokens
    if with_prompts:
        if batch_sizes[-1] > given.num_prompts:
            raise BenchmarkError(
                f"--batch {batch_sizes[-1]} is more than --num-prompts {given.num_prompts}; raise the latter"
            )
        found = prompts.collect(given.model, given.data, given.tasks, given.num_prompts, given.offset)
        longest += max(len(prompt.token_ids) for each in found.values() for prompt in each)
    else:
        longest += given.input_tokens
    report = inspection.inspected(given.model, inspection.draft_options(_first_sirius(arms)), given.dtype)
    cache = given.kv_cache_memory_bytes or max(SMALLEST_CACHE_BYTES, batch_sizes[-1] * SEQUENCE_BYTES)
    # Room beyond the last token, so that the end of the context cuts no draft short.
    max_model_len = rounded_length(longest + MAX_KERNEL_SIZE)
    engine = engine_options(given.model, given.dtype, max_model_len, batch_sizes[-1], cache)
    folder.mkdir(parents=True, exist_ok=True)
    most = getattr(given, "most_batches", None)
    sizes = (batch_sizes, given.max_tokens, given.repeats)
    return BenchmarkSetting(given.model, name, arms, engine, report, found, *sizes, folder, most)


def new_result(kind: str, setting: BenchmarkSetting, given: argparse.Namespace) -> Result:
    """Begins the file of a run.

    Args:
        kind: ``run``, ``server`` or ``latency``.
        setting: What all arms share.
        given: The command line.

    Returns:
        Provenance and arms, without records.
    """
    step_bytes = setting.inspection.step_bytes
    provenance = {
        "kind": kind,
        "model": setting.name,
        "engine": {key: value for key, value in setting.engine.items() if key != "model"},
        "prompts": [
            {"task": p.task, "index": p.index, "tokens": len(p.token_ids), "text": p.text}
            for task in setting.prompts.values()
            for p in task
        ],
        "batches": setting.batches,
        "repeats": setting.repeats,
        "sampling": {"temperature": 0.0, "max_tokens": setting.max_tokens},
        "step_bytes": step_bytes,
        "ffn_share": setting.inspection.ffn_share,
        **describe_machine(),
    }
    arms = {}
    for arm in setting.arms:
        options = dict(arm.speculative_config)
        if "model" in options:
            options["model"] = model_name(str(options["model"]))
        arms[arm.name] = {
            "speculative_config": options,
            "compiled": arm.compiled,
            "kernel_size": arm.kernel_size,
            "draft_density": inspection.draft_density(arm, setting.model, given.dtype, step_bytes),
            "status": f"{results.NOT_INSTALLED}: {arm.missing_package}" if arm.missing_package else results.MEASURED,
        }
    return Result(provenance, arms)


def usable(arms: Iterable[Configuration]) -> list[Configuration]:
    """The arms whose packages are installed; says which are not.

    Args:
        arms: The arms.

    Returns:
        Those that can run.
    """
    found = []
    for arm in arms:
        if arm.missing_package:
            print(f"  {arm.name}: left out, the package {arm.missing_package} is not installed", flush=True)
        else:
            found.append(arm)
    return found


def fail(result: Result, arm: Configuration, folder: Path, error: Exception) -> None:
    """Notes why an arm could not be measured and says so.

    Args:
        result: The file of the run.
        arm: The arm.
        folder: Of the run; named in the message and not in the file.
        error: The reason.

    Raises:
        BenchmarkError: If the arm is vLLM alone, without which nothing can be compared.
    """
    if arm.alone:
        raise BenchmarkError(f"{arm.name}: {error}") from error
    print(f"  {arm.name}: left out, {error}", flush=True)
    reason = str(error).splitlines()[0].replace(str(folder), ".")
    result.arms[arm.name]["status"] = f"{results.FAILED}: {reason}"


def any_failed(result: Result) -> bool:
    """Whether an arm failed."""
    return any(arm["status"].startswith(results.FAILED) for arm in result.arms.values())


def model_name(model: str) -> str:
    """Name of a model: the folder's, or the hub name."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def positive(text: str) -> int:
    """Parses a whole number above 0 of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def not_negative(text: str) -> int:
    """A number of the command line that may be 0.

    Args:
        text: What was written.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: If it is below 0.
    """
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def _first_sirius(arms: list[Configuration]) -> Any:
    return next((arm.sirius for arm in arms if arm.sirius is not None), None)


def _check_model(option: str, model: str | None) -> None:
    """Refuses a path that leads nowhere; a hub name has at most one slash and no dot in front."""
    if model is None or Path(model, "config.json").is_file():
        return
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise BenchmarkError(f"{option} {model}: there is no model; `make model` lists those that can be fetched")
