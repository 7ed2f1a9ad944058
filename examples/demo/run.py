"""Compares vLLM with and without Sirius on real prompts: `make demo`, or `run.py [--model MODEL] ...`.

Every arm is an engine of its own. All engines stay loaded, and each prompt is answered by each of them before the next
prompt, in rotating order, so that what else the machine does falls on all arms alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import chart
import report
from prompts import WARM_UP_QUESTION, Prompt, collect_prompts
from report import Arm

from vllm_sirius.errors import SiriusError
from vllm_sirius.measuring import memory
from vllm_sirius.measuring.engine import Engine, EngineError
from vllm_sirius.measuring.inspection import Inspection, inspect
from vllm_sirius.measuring.machine import describe_machine
from vllm_sirius.measuring.prompts import tokenize
from vllm_sirius.measuring.side_by_side import PAUSE_SECONDS, WARM_UP_TOKENS, engine_options, rounded_length

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MODEL = ROOT / ".models" / "qwen2.5-coder-0.5b-instruct"
ARMS = ("lossless", "threshold", "lossless-coarse", "threshold-coarse", "threshold-fine")
"""Rule, lossless being the default, and sparsity where it is not the default for this machine."""
DEFAULT_ARMS = ARMS[:3]

KV_CACHE_BYTES = 256 << 20


class DemoError(Exception):
    """A failure that the user can act on; its text is the whole message."""


@dataclass(frozen=True)
class DemoSetting:
    """The model and what all arms share.

    Attributes:
        model: Path or hub name.
        name: Its name for tables.
        inspection: What is known of it.
        engine: Arguments of `vllm.LLM`.
        prompts: The prompts.
        warm_up: Token ids of the warm-up prompt.
        max_tokens: Most tokens per answer.
    """

    model: str
    name: str
    inspection: Inspection
    engine: dict[str, Any]
    prompts: list[Prompt]
    warm_up: list[int]
    max_tokens: int


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def make_arms(given: argparse.Namespace) -> list[Arm]:
    """Lists vLLM alone and the chosen arms of Sirius.

    Args:
        given: The command line.

    Returns:
        The arms, vLLM alone first.

    Raises:
        DemoError: If the model cannot be served with Sirius.
    """
    arms = [Arm("vllm", "vLLM alone", {}, 1.0)]
    for key in given.arms:
        acceptance, _, sparsity = key.partition("-")
        options = {"method": "sirius", "kernel_size": given.kernel_size}
        if sparsity:
            options |= {"sparsity": sparsity, "density": given.density}
        if acceptance == "threshold":
            options |= {"acceptance": acceptance, "threshold": given.threshold}
        title = f"Sirius {acceptance}" + (f", {sparsity}" if sparsity else " (default)" if key == ARMS[0] else "")
        arms.append(Arm(key, title, options, inspected(given.model, options).draft_density))
    return arms


def inspected(model: str, options: dict[str, Any]) -> Inspection:
    """Looks at a model.

    Args:
        model: Path or hub name.
        options: Options of Sirius.

    Raises:
        DemoError: If it cannot be served with them.
    """
    try:
        return inspect(model, options, "bfloat16")
    except SiriusError as error:
        raise DemoError(str(error)) from error


def prepare(given: argparse.Namespace) -> DemoSetting:
    """Looks at the model and the prompts.

    Args:
        given: The command line.

    Returns:
        What all arms share.

    Raises:
        DemoError: If the model is missing or cannot be served with Sirius.
    """
    if given.model == str(DEFAULT_MODEL) and not (DEFAULT_MODEL / "config.json").is_file():
        raise DemoError(f"the model is missing: run `make model NAME={DEFAULT_MODEL.name}`, or give --model")
    name = Path(given.model).name if Path(given.model).is_dir() else given.model
    say(f"looking at {name} ...")
    inspection = inspected(given.model, {"kernel_size": given.kernel_size})
    say(
        f"  {inspection.gated_ffns} gated FFNs of {inspection.neurons} neurons; "
        f"{inspection.ffn_share:.0%} of the bytes of a step are FFN"
    )
    prompts = collect_prompts(given.model, given.num_prompts)
    longest = max(len(prompt.token_ids) for prompt in prompts) + given.max_tokens
    sources = sorted({prompt.source for prompt in prompts})
    counts = ", ".join(f"{sum(p.source == source for p in prompts)} {source}" for source in sources)
    say(f"  {len(prompts)} prompts ({counts}), at most {given.max_tokens} tokens each")
    # Compiling four engines takes longer than the rest, and on CPU gains nothing measurable.
    engine = engine_options(given.model, "bfloat16", rounded_length(longest), 1, KV_CACHE_BYTES, enforce_eager=True)
    warm_up = tokenize(given.model, [WARM_UP_QUESTION])[0]
    return DemoSetting(given.model, name, inspection, engine, prompts, warm_up, given.max_tokens)


def start_engines(setting: DemoSetting, arms: Sequence[Arm], folder: Path, stack: ExitStack) -> list[Engine]:
    """Starts the engines one after the other and warms each up with a prompt.

    Args:
        setting: What all arms share.
        arms: The arms.
        folder: Takes the logs.
        stack: Ends the engines.

    Returns:
        The engines, in the order of the arms.

    Raises:
        DemoError: If an engine does not start.
    """
    engines = []
    for number, arm in enumerate(arms, start=1):
        say(f"[{number}/{len(arms)}] starting {arm.title} ...")
        started = time.monotonic()
        options = {**setting.engine, **({"speculative_config": arm.options} if arm.options else {})}
        try:
            engine = Engine(options, folder / f"{arm.key}.log")
            stack.callback(engine.close)
            engine.generate([setting.warm_up], WARM_UP_TOKENS)
        except EngineError as error:
            raise DemoError(f"{arm.title}: {error}") from error
        arm.start_up_line = engine.start_up_line()
        if arm.start_up_line:
            say(f"      {arm.start_up_line}")
        say(f"[{number}/{len(arms)}] ready and warm after {time.monotonic() - started:.0f} s")
        engines.append(engine)
    return engines


def answer_prompts(setting: DemoSetting, arms: Sequence[Arm], engines: Sequence[Engine]) -> None:
    """Lets every arm answer every prompt, in rotating order, and says how each prompt went.

    Args:
        setting: What all arms share.
        arms: The arms, whose answers are filled in.
        engines: Their engines.

    Raises:
        DemoError: If an engine stops.
    """
    for round_number, prompt in enumerate(setting.prompts):
        for turn in range(len(arms)):
            index = (round_number + turn) % len(arms)
            time.sleep(PAUSE_SECONDS)
            try:
                answer = engines[index].generate([prompt.token_ids], setting.max_tokens)
            except EngineError as error:
                raise DemoError(f"{arms[index].title}: {error}") from error
            arms[index].answers.append(answer)
        alone = arms[0].answers[-1]
        parts = [f"vLLM alone {alone.num_tokens / alone.seconds:.1f} tokens/s"]
        parts += [f"{arm.key} {report.prompt_ratio(arm.answers[-1], alone):.2f}x" for arm in arms[1:]]
        say(f"prompt {round_number + 1:2}/{len(setting.prompts)} ({prompt.source}): {', '.join(parts)}")


def write_results(setting: DemoSetting, arms: Sequence[Arm], given: argparse.Namespace) -> str:
    """Writes table, JSON and chart.

    Args:
        setting: What all arms share.
        arms: The arms with their answers.
        given: The command line.

    Returns:
        The table.
    """
    rows = [report.compare(arm, arms[0]) for arm in arms]
    machine = describe_machine()
    conditions = (
        f"{setting.name}, {len(setting.prompts)} prompts, greedy, bfloat16, batch 1, "
        f"at most {setting.max_tokens} tokens each"
    )
    table = f"{conditions}\n{report.format_table(rows, given.kernel_size)}"
    provenance = {
        "model": setting.name,
        "prompts": [{"source": p.source, "tokens": len(p.token_ids), "text": p.text} for p in setting.prompts],
        "sampling": {"temperature": 0.0, "max_tokens": setting.max_tokens},
        "engine": {key: value for key, value in setting.engine.items() if key != "model"},
        "kernel_size": given.kernel_size,
        "density": given.density,
        "threshold": given.threshold,
        "inspection": asdict(setting.inspection),
        **machine,
    }
    (given.output / "demo.txt").write_text(table + "\n")
    (given.output / "demo.json").write_text(json.dumps(report.as_json(arms, rows, provenance), indent=2) + "\n")
    subtitle = f"{conditions}\n{machine['cores']} cores of {machine['cpu']}, {machine['vllm']}"
    chart.draw(rows, given.kernel_size, subtitle, given.output / "demo.png")
    return table


def run(given: argparse.Namespace) -> None:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Raises:
        DemoError: If something is missing or an engine fails.
    """
    started = time.monotonic()
    given.output.mkdir(parents=True, exist_ok=True)
    setting = prepare(given)
    arms = make_arms(given)
    needed = memory.engines_bytes(setting.model, setting.inspection, KV_CACHE_BYTES, len(arms) - 1)
    free = memory.available_bytes()
    say(f"  {len(arms)} engines need about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available")
    if needed > free:
        raise DemoError(
            f"{len(arms)} engines side by side need about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are "
            f"available: end other programs, choose a smaller --model, or fewer arms, for example --arms {ARMS[0]}"
        )
    with ExitStack() as stack:
        engines = start_engines(setting, arms, given.output, stack)
        answer_prompts(setting, arms, engines)
        table = write_results(setting, arms, given)
        say("ending the engines ...")
    say(f"\n{table}\n")
    say(
        "A threshold is lossy: tokens pass that vLLM alone would not choose. Lossless differs by bfloat16 rounding only."
    )
    say(
        f"table, numbers and chart: {given.output}/demo.txt, demo.json, demo.png; {time.monotonic() - started:.0f} s in all"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(description="Compares vLLM with and without Sirius on real prompts.")
    parser.add_argument(
        "--model", default=str(DEFAULT_MODEL), help=f"path or hub name (default: .models/{DEFAULT_MODEL.name})"
    )
    parser.add_argument("--num-prompts", type=_positive, default=12, help="default: %(default)s")
    parser.add_argument(
        "--max-tokens", type=_positive, default=128, help="most tokens per answer (default: %(default)s)"
    )
    parser.add_argument("--kernel-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--density", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument("--threshold", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS, help="arms of Sirius (default: the first three)"
    )
    parser.add_argument("--output", type=Path, default=Path("results/demo"), help="folder (default: %(default)s)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 1 after a failure, 130 after an interruption.
    """
    try:
        run(parse_arguments(arguments))
    except (DemoError, SiriusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
