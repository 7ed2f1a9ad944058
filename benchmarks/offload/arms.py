"""The arms of the comparison on a throttled disk: Sirius, the same engine without drafts, vLLM alone, and other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.errors import BenchmarkError
from benchmarks.offload import accelerate_arm, llama
from benchmarks.offload.llama import LlamaFiles
from vllm_sirius.measuring.engine import Answers, Engine
from vllm_sirius.measuring.side_by_side import engine_options

RATE = "SIRIUS_OFFLOAD_GB_PER_SECOND"
"""Environment variable that bounds the rate of our own reader; see `vllm_sirius.integration.offloaded_target`."""

OURS, OFF, ALONE, ACCELERATE, LLAMA, LLAMA_DRAFT = (
    "sirius",
    "sirius-off",
    "vllm",
    "accelerate",
    "llama",
    "llama-draft",
)
NAMES = (OURS, OFF, LLAMA, LLAMA_DRAFT, ACCELERATE, ALONE)


LLAMA_BYTES, ACCELERATE_BYTES = 300_000_000, 700_000_000
"""Programs, buffers and activations, with room to spare: what they need in the way of memory decides about nothing."""


class Answerer(Protocol):
    """A program that answers prompts one at a time."""

    def answer(self, token_ids: Sequence[int], max_tokens: int) -> Answers:
        """Answers one prompt greedily."""

    def close(self) -> None:
        """Ends the program."""


@dataclass(frozen=True)
class Sizes:
    """What all arms share.

    Attributes:
        model: Folder of the checkpoint.
        max_model_len: Longest text.
        kv_cache_bytes: KV cache of one engine.
        weight_bytes: Memory for weights inside of the bound.
        threads: Threads of programs that do not choose them by themselves.
        patience_seconds: Longest wait for one answer.
    """

    model: str
    max_model_len: int
    kv_cache_bytes: int
    weight_bytes: int
    threads: int
    patience_seconds: float


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: Its name.
        about: What it is, in a few words.
        start: Starts it: words before its command, and the file for what it prints.
        files: What it reads weights from.
        drafts: Whether it drafts; otherwise each token is a pass over all weights.
        may_run_out: Whether running out of memory is a result and no failure.
        missing: What it needs and does not find; empty where nothing is missing.
        own_bytes: What the program itself takes, beside weights and KV cache; ``None`` for engines of vLLM.
        options: For the results file.
    """

    name: str
    about: str
    start: Callable[[Sequence[str], Path], Answerer]
    files: Sequence[Path]
    drafts: bool = False
    may_run_out: bool = False
    missing: str = ""
    own_bytes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


class EngineAnswers:
    """An engine of vLLM as an `Answerer`.

    Args:
        engine: The engine.
        sampling: More of vLLM's `SamplingParams`.
    """

    def __init__(self, engine: Engine, sampling: dict[str, Any]) -> None:
        self._engine, self._sampling = engine, sampling

    def answer(self, token_ids: Sequence[int], max_tokens: int) -> Answers:
        """Answers one prompt greedily.

        Args:
            token_ids: The prompt.
            max_tokens: Most tokens of the answer.
        """
        return self._engine.generate([token_ids], max_tokens, **self._sampling)

    def draft_seconds(self) -> float:
        """Seconds of a draft step of one token, timed anew."""
        return self._engine.costs()["draft_seconds"]["1"]

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()


def choose(
    names: Sequence[str],
    sizes: Sizes,
    sirius: dict[str, Any],
    weights: Path,
    llama_files: LlamaFiles,
    draft_lengths: Sequence[int],
) -> list[Arm]:
    """Makes arms.

    Args:
        names: Their names.
        sizes: What all share.
        sirius: The speculative config of Sirius.
        weights: Folder of the file that Sirius streams.
        llama_files: Where llama.cpp and its models lie.
        draft_lengths: Most tokens of llama.cpp's drafts, an arm for each.

    Raises:
        BenchmarkError: On a name that is none.
    """
    found = []
    for name in dict.fromkeys(names):
        if name not in NAMES:
            raise BenchmarkError(f"--arms {name}: there is no such arm; choose from {', '.join(NAMES)}")
        if name == LLAMA_DRAFT:
            found += [_llama(sizes, llama_files, length) for length in draft_lengths]
        elif name == LLAMA:
            found.append(_llama(sizes, llama_files, 0))
        elif name == ACCELERATE:
            found.append(_accelerate(sizes))
        else:
            found.append(_engine(name, sizes, sirius, weights))
    return found


def _engine(name: str, sizes: Sizes, sirius: dict[str, Any], weights: Path) -> Arm:
    own: dict[str, Any] = {} if name == ALONE else {"speculative_config": sirius}
    options = engine_options(
        sizes.model, "bfloat16", sizes.max_model_len, 1, sizes.kv_cache_bytes, enforce_eager=True, **own
    )
    sampling: dict[str, Any] = {"extra_args": {"sirius": "off"}} if name == OFF else {}

    def start(prefix: Sequence[str], log: Path) -> Answerer:
        engine = Engine(options, log, prefix=prefix, answer_seconds=sizes.patience_seconds)
        return EngineAnswers(engine, sampling)

    about = {
        OURS: "Sirius, offload: disk",
        OFF: "the same engine, sirius: off",
        ALONE: "vLLM alone",
    }[name]
    files = sorted(Path(sizes.model).glob("*.safetensors")) if name == ALONE else [weights]
    public = {key: value for key, value in sirius.items() if key != "offload_path"} if own else {}
    return Arm(name, about, start, files, drafts=name == OURS, may_run_out=name == ALONE, options=public)


def _llama(sizes: Sizes, files: LlamaFiles, draft_length: int) -> Arm:
    def start(prefix: Sequence[str], log: Path) -> Answerer:
        command = files.command(sizes.max_model_len, sizes.threads, draft_length)
        kept = files.draft if draft_length else None
        return llama.LlamaServer(command, prefix, log, sizes.patience_seconds, kept)

    read = [files.whole, files.draft] if draft_length else [files.whole]
    if not draft_length:
        return Arm(LLAMA, "llama.cpp, bf16 by mmap", start, read, missing=files.missing(), own_bytes=LLAMA_BYTES)
    return Arm(
        f"{LLAMA_DRAFT}@{draft_length}",
        f"llama.cpp, bf16 by mmap, own {files.draft_type} draft of {draft_length}, kept in memory",
        start,
        read,
        drafts=True,
        missing=files.missing(),
        own_bytes=LLAMA_BYTES,
        options={"draft_tokens": draft_length, "draft_type": files.draft_type},
    )


def _accelerate(sizes: Sizes) -> Arm:
    def start(prefix: Sequence[str], log: Path) -> Answerer:
        return accelerate_arm.AccelerateModel(
            sizes.model, sizes.weight_bytes, sizes.threads, prefix, log, sizes.patience_seconds
        )

    return Arm(
        ACCELERATE,
        "accelerate, layers on the disk",
        start,
        sorted(Path(sizes.model).glob("*.safetensors")),
        missing=accelerate_arm.missing(),
        may_run_out=True,
        own_bytes=ACCELERATE_BYTES,
        options={"memory_for_weights": sizes.weight_bytes},
    )
