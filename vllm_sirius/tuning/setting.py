"""What all engines of one run share: the prompts as tokens and the arguments of `vllm.LLM`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sirius.measuring.inspection import Inspection
from vllm_sirius.measuring.prompts import tokenize
from vllm_sirius.measuring.side_by_side import engine_options, rounded_length
from vllm_sirius.tuning.errors import TuningOptionError
from vllm_sirius.tuning.options import TuningOptions
from vllm_sirius.tuning.prompts_file import PromptFile

LEAST_KV_CACHE_BYTES = 256 << 20
KV_CACHE_SLACK = 1.25
"""KV cache over that of a full batch: blocks are whole, and drafts need slots of their own."""

GPU_MEMORY_UTILIZATION = 0.1
"""Part of a GPU's memory that vLLM wants free when an engine starts, even where ``kv_cache_memory_bytes`` sizes its cache.
With vLLM's default a second engine would not start beside the first."""


@dataclass(frozen=True)
class TuningSetting:
    """What all engines share.

    Attributes:
        options: What the user asked for.
        inspection: What is known of model and machine.
        source: Where the prompts come from.
        batches: Token ids of the prompts, in batches of one size.
        engine: Arguments of `vllm.LLM`, all but the speculative config.
        num_in_file: Prompts of the file, of which those of `batches` are used.
    """

    options: TuningOptions
    inspection: Inspection
    source: str
    batches: list[list[list[int]]]
    engine: dict[str, Any]
    num_in_file: int

    @property
    def name(self) -> str:
        """The model's name for tables."""
        path = Path(self.options.model)
        return path.resolve().name if path.is_dir() else self.options.model

    @property
    def adaptive(self) -> bool:
        """Whether draft lengths adapt here, which does better than any fixed length: on Model Runner V1, that of CPUs."""
        return self.inspection.platform == "cpu"

    @property
    def num_prompts(self) -> int:
        """Prompts in all batches."""
        return sum(len(batch) for batch in self.batches)

    @property
    def conditions(self) -> str:
        """The conditions of the measurement, one line."""
        return (
            f"{self.name}, {self.num_prompts} of {self.num_in_file} prompts ({self.source}), greedy, "
            f"{self.inspection.dtype}, batch {self.options.batch}, at most {self.options.max_tokens} tokens each"
        )

    @property
    def why_these_prompts(self) -> str:
        """Why not all prompts of the file are used, and how to use more; empty where all are."""
        read = min(self.options.num_prompts, self.num_in_file)
        reasons = []
        if read < self.num_in_file:
            reasons.append(
                f"--num-prompts={self.options.num_prompts} takes the first {read} of {self.num_in_file} prompts: more make "
                "the result surer and the measurement longer"
            )
        if self.num_prompts < read:
            reasons.append(
                f"--batch={self.options.batch} leaves out the last {read - self.num_prompts} of {read}, which fill no batch"
            )
        return "; ".join(reasons)


def make_setting(options: TuningOptions, inspection: Inspection, prompts: PromptFile) -> TuningSetting:
    """Puts the prompts into the model's chat template and sizes the engines for them.

    Args:
        options: What the user asked for.
        inspection: What is known of model and machine.
        prompts: The prompts.

    Returns:
        The setting.

    Raises:
        TuningOptionError: If there are fewer prompts than one batch takes, or the texts are too long.
    """
    if len(prompts.texts) < options.batch:
        raise TuningOptionError(
            f"--batch={options.batch} needs as many prompts and --prompts={options.prompts} has {len(prompts.texts)}: add "
            "prompts or use a smaller batch."
        )
    batches = whole_batches(tokenize(options.model, prompts.texts, options.trust_remote_code), options.batch)
    longest = max(len(prompt) for batch in batches for prompt in batch) + options.max_tokens
    max_model_len = choose_max_model_len(longest, options.max_model_len, inspection.max_model_len)
    kv_cache = int(options.batch * max_model_len * inspection.kv_bytes_per_token * KV_CACHE_SLACK)
    engine = engine_options(
        options.model,
        options.dtype,
        max_model_len,
        options.batch,
        max(LEAST_KV_CACHE_BYTES, kv_cache),
        trust_remote_code=options.trust_remote_code,
        enforce_eager=options.enforce_eager,
    )
    if inspection.platform != "cpu":
        engine["gpu_memory_utilization"] = GPU_MEMORY_UTILIZATION
    return TuningSetting(options, inspection, prompts.source, batches, engine, prompts.num_in_file)


def whole_batches(prompts: list[list[int]], size: int) -> list[list[list[int]]]:
    """Splits prompts into batches of one size, for a smaller one would cost something else; a rest is left out."""
    return [prompts[start : start + size] for start in range(0, len(prompts) - size + 1, size)]


def choose_max_model_len(longest: int, wanted: int | None, possible: int) -> int:
    """The longest text of the engines.

    Args:
        longest: Tokens of the longest prompt and its answer.
        wanted: What the user gave.
        possible: What the model can.

    Returns:
        What the user gave, or what the texts need.

    Raises:
        TuningOptionError: If the texts are longer.
    """
    limit = possible if wanted is None else wanted
    if longest > limit:
        option = "the model's longest text" if wanted is None else "--max-model-len"
        remedy = "--max-tokens" if wanted is None else "--max-tokens, or a larger --max-model-len"
        raise TuningOptionError(
            f"the longest prompt and its answer take {longest} tokens, {option} is {limit}: use shorter prompts, a smaller "
            f"{remedy}."
        )
    return limit if wanted is not None else min(possible, rounded_length(longest))
