"""The command line of ``vllm-sirius tune``, judged before anything slow starts. Leaf module."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from vllm_sirius.config import MAX_KERNEL_SIZE, MIN_KERNEL_SIZE
from vllm_sirius.tuning.errors import TuningOptionError

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEFAULT_NUM_PROMPTS = 4


@dataclass(frozen=True)
class TuningOptions:
    """What the user asked for.

    Attributes:
        model: Path or hub name.
        prompts: File of prompts.
        num_prompts: Most prompts to read from it.
        max_tokens: Most tokens per answer.
        batch: Prompts that are answered together.
        dtype: As vLLM's option of that name.
        max_model_len: Longest text of the engines, or ``None`` for what the prompts need.
        max_kernel_size: Largest kernel size of the grid.
        trust_remote_code: As vLLM's option of that name.
        quick: Measure fewer drafts.
        enforce_eager: As vLLM's option of that name.
        output: Name of the files to write; ``sirius.json`` stands for ``sirius-lossless.json`` and
            ``sirius-threshold.json``.
        report: File that takes everything measured, or ``None``.
    """

    model: str
    prompts: Path | None = None
    num_prompts: int = DEFAULT_NUM_PROMPTS
    max_tokens: int = 64
    batch: int = 1
    dtype: str = "auto"
    max_model_len: int | None = None
    max_kernel_size: int = 16
    trust_remote_code: bool = False
    quick: bool = False
    enforce_eager: bool = True
    output: Path = Path("sirius.json")
    report: Path | None = None

    def check(self) -> None:
        """Judges the options against each other and the file system.

        Raises:
            TuningOptionError: Naming the option, its value and the remedy.
        """
        _require_least("--num-prompts", self.num_prompts, 1)
        _require_least("--max-tokens", self.max_tokens, 1)
        _require_least("--batch", self.batch, 1)
        if self.max_model_len is not None:
            _require_least("--max-model-len", self.max_model_len, 1)
        if not MIN_KERNEL_SIZE <= self.max_kernel_size <= MAX_KERNEL_SIZE:
            raise TuningOptionError(
                f"--max-kernel-size={self.max_kernel_size} is not from {MIN_KERNEL_SIZE} to {MAX_KERNEL_SIZE}: choose "
                "one, for example 16."
            )
        if self.max_tokens <= self.max_kernel_size:
            raise TuningOptionError(
                f"--max-tokens={self.max_tokens} leaves no room for a whole draft at --max-kernel-size="
                f"{self.max_kernel_size}: use more than {self.max_kernel_size}, better four times as many."
            )
        if self.num_prompts < self.batch:
            raise TuningOptionError(
                f"--num-prompts={self.num_prompts} does not fill one batch of --batch={self.batch}: use at least "
                f"{self.batch}."
            )
        self._check_files()

    def _check_files(self) -> None:
        if self.prompts is None:
            raise TuningOptionError(
                "--prompts is missing: give a file with one prompt per line, or JSON lines with a field prompt, question or "
                "text; use prompts like those you serve, for acceptance depends on them."
            )
        for option, path in (("--output", self.output), ("--report", self.report)):
            if path is None:
                continue
            if path.suffix != ".json":
                raise TuningOptionError(
                    f"{option}={path} is not the name of a JSON file: use {path.stem or 'sirius'}.json."
                )
            if path.is_dir():
                raise TuningOptionError(
                    f"{option}={path} is a folder: name a file in it, for example {path / 'sirius.json'}."
                )
            if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
                raise TuningOptionError(
                    f"{option}={path} cannot be written: make the folder {path.parent}, or choose another one."
                )

    def output_file(self, acceptance: str) -> Path:
        """The file that takes the settings of one acceptance rule."""
        return self.output.with_stem(f"{self.output.stem}-{acceptance}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser.

    Args:
        parser: The parser of the subcommand.
    """
    default = TuningOptions("")
    parser.add_argument("model", help="path or hub name")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt per line, or JSON lines with a field prompt, question or text",
    )
    _add_number(parser, "--num-prompts", default.num_prompts, "most prompts to read")
    _add_number(parser, "--max-tokens", default.max_tokens, "most tokens per answer")
    _add_number(parser, "--batch", default.batch, "prompts that are answered together")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="default: %(default)s")
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest text of the engines (default: what the prompts need)"
    )
    _add_number(parser, "--max-kernel-size", default.max_kernel_size, "largest kernel size to judge")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--quick", action="store_true", help="measure fewer drafts")
    parser.add_argument(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=default.enforce_eager,
        help="do not compile the engines; compiling each takes longer than the rest (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=default.output,
        help="%(default)s, the default, writes sirius-lossless.json and sirius-threshold.json",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="JSON file that takes everything measured")


def from_arguments(given: argparse.Namespace) -> TuningOptions:
    """Reads the options out of a parsed command line.

    Args:
        given: What a parser with `add_arguments` found.

    Returns:
        The checked options.

    Raises:
        TuningOptionError: If one is bad.
    """
    options = TuningOptions(**{name: getattr(given, name) for name in TuningOptions.__dataclass_fields__})
    options.check()
    return options


def _add_number(parser: argparse.ArgumentParser, flag: str, default: int, text: str) -> None:
    parser.add_argument(flag, type=int, metavar="N", default=default, help=f"{text} (default: %(default)s)")


def _require_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise TuningOptionError(f"{option}={value} is not a whole number of at least {least}: choose one.")
