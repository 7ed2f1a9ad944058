"""vLLM's speculative config for the method ``sirius``. Attaches to ``vllm.config.speculative``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import vllm.envs as envs
from pydantic import SkipValidation
from vllm.config import ModelConfig, ParallelConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.triton_utils import HAS_TRITON
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_sirius.config import SiriusConfig
from vllm_sirius.errors import SiriusConfigError
from vllm_sirius.pacing.batch_length import draft_lengths
from vllm_sirius.version import __version__

METHOD: Literal["sirius"] = "sirius"
SCHEDULE = "num_speculative_tokens_per_batch_size"


@dataclass(frozen=True)
class ResolvedDraft:
    """What the options of an engine came to when its target was loaded.

    Attributes:
        config: The options, with ``auto`` decided.
        native: Whether drafts run on native kernels.
        streamed: Groups of the target's layers that are read from a disk.
    """

    config: SiriusConfig
    native: bool
    streamed: tuple[int, ...] = ()


@config
class SiriusSpeculativeConfig(SpeculativeConfig):
    """A speculative config whose draft is the target itself.

    Attributes:
        sirius: The options, as the user gave them.
        adaptive_lengths: Draft lengths from which the scheduler chooses one for each batch, or ``None`` if it does not.
        resolved: What the options came to, or ``None`` before the target is loaded.
    """

    method: Literal["sirius"] | None = "sirius"
    sirius: SkipValidation[SiriusConfig] = None  # type: ignore[assignment]
    adaptive_lengths: SkipValidation[tuple[int, ...] | None] = None
    resolved: SkipValidation[ResolvedDraft | None] = None

    def __post_init__(self) -> None:
        """Fills in what upstream would read from a draft model; the parent's version would load one."""
        self.method = METHOD
        self.model = METHOD
        self.num_speculative_tokens = self.sirius.num_speculative_tokens
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config
        self.draft_sample_method = self.sirius.draft_sampling

    def compute_hash(self) -> str:
        """Key of what changes the compiled graphs of target and draft; vLLM loads a graph of the same key without a look at it.

        vLLM asks when a module is first run, so ``auto`` is decided by then. Coarse sparsity observes activations. Which
        layers of a draft are copies follows from the weights and their scope, which is without effect where nothing is
        copied. All other options are read while the operators run.
        """
        config, native = (self.sirius, None) if self.resolved is None else (self.resolved.config, self.resolved.native)
        streamed = () if self.resolved is None else self.resolved.streamed
        scope = None if config.draft_weights == "shared" else config.draft_weights_scope
        graph = (
            METHOD,
            __version__,
            config.sparsity,
            config.draft_weights,
            scope,
            config.target_kernels,
            native,
            streamed,
        )
        return hashlib.sha256(repr(graph).encode()).hexdigest()

    def __repr__(self) -> str:
        """The options, and nothing of the target's config that upstream prints elsewhere."""
        return f"SiriusSpeculativeConfig({self.sirius})"


def settle(vllm_config: Any, resolved: ResolvedDraft) -> None:
    """Writes down what the options came to, once the target is loaded and for all that reads the config from then on.

    Args:
        vllm_config: The config of a worker of Sirius.
        resolved: What they came to. It does not change any more.
    """
    speculative = vllm_config.speculative_config
    assert speculative.resolved in (None, resolved), "the options were decided before, in another way"
    speculative.resolved = resolved


def resolved_config(speculative_config: Any) -> SiriusConfig:
    """The options of an engine whose target is loaded, with ``auto`` decided.

    Args:
        speculative_config: A speculative config of Sirius.
    """
    resolved: ResolvedDraft | None = speculative_config.resolved
    assert resolved is not None, "the target is not loaded yet"
    return resolved.config


def create(
    options: dict[str, Any], target_model_config: ModelConfig, target_parallel_config: ParallelConfig
) -> SiriusSpeculativeConfig:
    """Builds the config from a user's options.

    Args:
        options: The flat speculative config.
        target_model_config: The target's model config.
        target_parallel_config: The target's parallel config.

    Returns:
        The config.

    Raises:
        SiriusConfigError: If an option is bad.
    """
    config = SiriusConfig.from_options(options)
    schedule, lengths = _schedule(options, config), None
    if schedule is None and config.adaptive and _expects_runner_v2() and target_parallel_config.data_parallel_size == 1:
        lengths = draft_lengths(config.num_speculative_tokens)
        schedule = _schedule_of(lengths)
    return SiriusSpeculativeConfig(
        sirius=config,
        adaptive_lengths=lengths,
        num_speculative_tokens_per_batch_size=schedule,
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
    )


def fix_lengths(speculative_config: Any) -> None:
    """Takes back that the scheduler chooses draft lengths.

    Args:
        speculative_config: A speculative config of Sirius.
    """
    if speculative_config.adaptive_lengths is not None:
        speculative_config.adaptive_lengths = None
        speculative_config.num_speculative_tokens_per_batch_size = None


def _expects_runner_v2() -> bool:
    """Whether the engine will run on Model Runner V2, as far as can be said before its whole config is there."""
    chosen: bool | None = envs.VLLM_USE_V2_MODEL_RUNNER
    return HAS_TRITON if chosen is None else chosen


def _schedule_of(lengths: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """A schedule that names every length, which is what CUDA graphs are captured by; no batch is scheduled by it."""
    return [(size, size, length) for size, length in enumerate(reversed(lengths), start=1)]


def _schedule(options: dict[str, Any], config: SiriusConfig) -> list[tuple[int, int, int]] | None:
    """Upstream's draft length by batch size, judged before the engine starts."""
    given = options.get(SCHEDULE, options.get(SCHEDULE.replace("_", "-")))
    if given is None:
        return None
    try:
        schedule = validate_and_normalize_dynamic_sd_schedule(given)
    except (TypeError, ValueError) as error:
        raise SiriusConfigError(f"{SCHEDULE}={given!r} is not a schedule: {error}") from error
    longest = max(count for _, _, count in schedule)
    if longest > config.num_speculative_tokens:
        raise SiriusConfigError(
            f"{SCHEDULE}={given!r} drafts {longest} tokens, more than kernel_size={config.kernel_size} allows: use at most "
            f"{config.num_speculative_tokens}, or kernel_size={longest + 1}."
        )
    return schedule


def sirius_config(speculative_config: SpeculativeConfig | None) -> SiriusConfig | None:
    """The options of a speculative config as the user gave them, or ``None`` if its method is another one."""
    if isinstance(speculative_config, SiriusSpeculativeConfig):
        return speculative_config.sirius
    return None
