"""Every option of Sirius: defaults, meaning, validation and error texts.

Leaf module: imports neither vLLM nor torch. `SiriusConfig.from_options` takes the flat mapping that users
write in ``--speculative-config`` and is the only place where an option is judged.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_sirius.errors import SiriusConfigError

SPARSITIES = ("auto", "coarse", "fine", "none")
ACCEPTANCES = ("lossless", "threshold")
DRAFT_WEIGHTS = ("auto", "shared", "int8", "int4")
DRAFT_WEIGHTS_SCOPES = ("ffn", "all")
DRAFT_SAMPLINGS = ("greedy", "probabilistic")
TARGET_KERNELS = ("auto", "vllm", "sirius")
OFFLOADS = ("none", "disk")

MIN_KERNEL_SIZE = 2
MAX_KERNEL_SIZE = 128
"""vLLM's rejection sampler takes at most 128 draft tokens a request; the drafts are ``kernel_size - 1``."""

OFFLOAD_KERNEL_SIZE = 64
"""Default where a pass of the target reads its weights from a disk: longer drafts share one reading."""

MAX_OFFLOAD_BUFFERS = 16

MAX_PROMPT_LOOKUP_TOKENS = 31
"""The draft's kernels take at most 32 tokens; one of them is no candidate."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "kernel_size": 16,
        "sparsity": "coarse",
        "density": 0.5,
        "refresh": False,
        "draft_weights": "shared",
        "acceptance": "threshold",
        "threshold": 0.1,
        "threshold_temperature": 0.6,
        "adaptive": False,
        "prompt_lookup_tokens": 0,
    }
}
"""Options by the name that stands for them; what the user gives beside the name goes before them."""

FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127
FLOAT32_MIN = 2.0**-126
"""Largest number of single precision, and the smallest above 0 that keeps its precision."""

ENGINE_OPTIONS = ("method", "model", "num_speculative_tokens", "num_speculative_tokens_per_batch_size")
"""Keys of a speculative config that are vLLM's own and may stand beside the options of Sirius."""


COARSE_OPTIONS = ("density", "refresh")
"""Options that choose coarse sparsity where none is given."""

THRESHOLD_OPTIONS = ("threshold", "threshold_temperature")
"""Options that choose the threshold rule where no acceptance rule is given."""

OFFLOAD_OPTIONS = ("offload_budget_gb", "offload_path", "offload_buffers")
"""Options that say how weights are offloaded."""


@dataclass(frozen=True)
class SiriusConfig:
    """The options of one engine.

    The first sentence of each entry is its line in the table of ``docs/options.md``, which is made of this text.

    Attributes:
        kernel_size: Most tokens that one verification pass of the target advances. A larger value spreads the cost of the
            pass over more draft tokens and wastes more of them when a draft is rejected. The paper calls it the period
            (section 4); vLLM's ``num_speculative_tokens`` is ``kernel_size - 1``, and either may be given.
        sparsity: Which neurons of each FFN the draft keeps: one set for the batch, the largest of each token, or all.
            ``coarse``: one set per layer for the whole batch (CSparse, GRIFFIN), the cheapest choice. ``fine``: the largest
            ``|act(gate)|`` of each token (FSparse, CATS); more is accepted, but every gate is read, so a draft step saves
            only two thirds as much. ``none``: all of them, with ``int8`` or ``int4`` alone; on a CPU the fastest by far.
            ``auto`` is ``none`` on a CPU with the compiled kernels, and ``coarse`` elsewhere or where ``density``,
            ``refresh`` or ``draft_weights: shared`` is given.
        density: Part of the FFN neurons that the draft keeps, above 0 and up to 1. Lower is cheaper for each draft step and
            rejected more often. Given alone it chooses ``coarse``.
        refresh: Coarse sparsity: learn the set of neurons anew from every verification pass. ``false`` is the paper's
            behaviour: the prompt fixes the set, and fewer drafts are accepted. Given alone it chooses ``coarse``.
        draft_weights: Weights that the draft reads: the target's own or quantised copies. ``shared`` are the target's own
            values. ``int8`` and ``int4`` (CPU) are quantised copies, rounded at load without calibration data, which cut
            the bytes of a draft step of a 16-bit model to a half or to 27 %. ``auto`` is ``shared`` on a GPU, where that
            takes no memory; on a CPU, where drafts need weights of their own anyway, ``int4`` where all neurons are kept
            and ``int8`` otherwise. Verification always reads the target's own weights, so ``lossless`` stays lossless.
        draft_weights_scope: What is quantised: the FFNs (``ffn``), or attention projections and lm_head as well (``all``).
        target_kernels: What runs the target's own linear layers on a CPU. ``vllm``: its kernels. ``sirius``: a kernel for
            the few tokens of a verification pass, on the same bfloat16 weights in another order, without more memory; it
            needs AVX-512 and bfloat16. ``auto``: ``sirius`` where it can run, unless the processor has AMX; decided by the
            processor and never by a measurement, so that every start gives the same answers, and said in the log. Both
            compute the same but for the last bit of rounding. On a GPU vLLM's run always.
        acceptance: Which draft tokens are kept: those that are the model's own, or those that it finds likely.
            ``lossless``: rejection sampling, the model's own output. ``threshold``: the paper's likelihood rule, which
            changes the output; longer drafts are kept where drafts are poor.
        draft_sampling: How the draft picks its tokens for requests with a temperature. ``greedy`` takes its likeliest;
            ``probabilistic`` draws from its distribution, which lossless acceptance corrects by standard rejection sampling
            (Model Runner V2 and ``lossless`` only). Greedy requests are drafted greedily either way.
        threshold: Keep a draft token while the target gives it at least this likelihood. Higher is closer to the model and
            slower; 0 or less accepts every token that the request's own constraints allow, more than 1 only the target's
            own choice. Given alone it chooses ``acceptance: threshold``.
        threshold_temperature: Temperature of that likelihood for greedy requests. 0.6 is the value of the authors' code,
            absent from the paper's Algorithm 1. Sampling requests use their own processed distribution. Given alone it
            chooses ``acceptance: threshold``.
        adaptive: Draft only as far as is expected to pay. On Model Runner V1 each request has its own length, on V2 the
            batch has one, unless vLLM's ``num_speculative_tokens_per_batch_size`` decides. ``false`` always drafts
            ``kernel_size - 1`` tokens.
        prompt_lookup_tokens: Most candidates from the request's own text that a draft step reads beside the token it
            drafts. As many are taken as pay by measured cost, the draft stays the same and takes fewer steps. 0 looks
            nothing up. Model Runner V1 only.
        offload: Where the target's weights lie: in memory, or in a file on a disk (CPU). With ``disk`` the draft's int4
            copies stay in memory and a verification pass streams the target's layers from the file, so that a model runs in
            little more than the memory of its 4-bit copy, with the answers of the whole one; ``draft_weights: int8`` takes
            twice the memory for drafts that are right for longer. ``kernel_size`` is then 64 unless it is given.
        offload_budget_gb: Memory for weights with ``offload: disk``, in GB (10**9 bytes). It holds the draft's copies, what
            is never streamed, buffers, and as many of the target's layers as still fit. The default is what the machine or
            its control group has left beside the KV cache and a margin; the start-up says how much that is.
        offload_path: Folder of the file with ``offload: disk``. The default lies beside the compiled kernels.
        offload_buffers: Layers that ``offload: disk`` reads ahead into, at least 2.
        tree_width: Draft branches per position; only 1 so far.
        preset: Name of a set of options, which those given beside it refine.
    """

    kernel_size: int = 16
    sparsity: str = "auto"
    density: float = 0.5
    refresh: bool = True
    draft_weights: str = "auto"
    draft_weights_scope: str = "all"
    target_kernels: str = "auto"
    acceptance: str = "lossless"
    draft_sampling: str = "greedy"
    threshold: float = 0.1
    threshold_temperature: float = 0.6
    adaptive: bool = True
    prompt_lookup_tokens: int = 7
    offload: str = "none"
    offload_budget_gb: float | None = None
    offload_path: str | None = None
    offload_buffers: int = 2
    tree_width: int = 1
    preset: str | None = None  # a label: `from_options` puts the values in

    def __post_init__(self) -> None:
        """Checks each value on its own, then the values against each other.

        Raises:
            SiriusConfigError: Naming the option, the value and the remedy.
        """
        _require_int("kernel_size", self.kernel_size, MIN_KERNEL_SIZE, MAX_KERNEL_SIZE)
        _require_choice("sparsity", self.sparsity, SPARSITIES)
        _require_number("density", self.density)
        if not 0.0 < self.density <= 1.0:
            raise SiriusConfigError(
                f"density={self.density!r} is not in (0, 1]: give the part of the FFN neurons that the draft keeps, "
                "for example 0.5."
            )
        _require_bool("refresh", self.refresh)
        _require_choice("draft_weights", self.draft_weights, DRAFT_WEIGHTS)
        _require_choice("draft_weights_scope", self.draft_weights_scope, DRAFT_WEIGHTS_SCOPES)
        _require_choice("target_kernels", self.target_kernels, TARGET_KERNELS)
        _require_choice("acceptance", self.acceptance, ACCEPTANCES)
        _require_choice("draft_sampling", self.draft_sampling, DRAFT_SAMPLINGS)
        if self.draft_sampling == "probabilistic" and not self.lossless:
            raise SiriusConfigError(
                "draft_sampling='probabilistic' needs acceptance='lossless', which weighs a drawn token by its probability; "
                "the threshold rule does not: use acceptance='lossless' without a threshold, or draft_sampling='greedy'."
            )
        _require_number("threshold", self.threshold)
        _require_number("threshold_temperature", self.threshold_temperature)
        if self.threshold_temperature < FLOAT32_MIN:
            raise SiriusConfigError(
                f"threshold_temperature={self.threshold_temperature!r} is not above 0 in single precision: use 0.6, the value "
                "of the paper's code, or 1.0 for the plain likelihood."
            )
        _require_bool("adaptive", self.adaptive)
        _require_int("prompt_lookup_tokens", self.prompt_lookup_tokens, 0, MAX_PROMPT_LOOKUP_TOKENS)
        self._check_offload()
        _require_int("tree_width", self.tree_width, 1, None)
        self._check_supported()

    def _check_offload(self) -> None:
        _require_choice("offload", self.offload, OFFLOADS)
        if self.offload_budget_gb is not None:
            _require_number("offload_budget_gb", self.offload_budget_gb)
            if self.offload_budget_gb <= 0.0:
                raise SiriusConfigError(
                    f"offload_budget_gb={self.offload_budget_gb!r} is no amount of memory: give GB above 0, or leave it out for "
                    "what the machine has left."
                )
        if self.offload_path is not None and (not isinstance(self.offload_path, str) or not self.offload_path):
            raise SiriusConfigError(
                f"offload_path={self.offload_path!r} is not the path of a folder: give one, as text."
            )
        _require_int("offload_buffers", self.offload_buffers, 2, MAX_OFFLOAD_BUFFERS)
        if self.offload == "none":
            return
        wanted = {
            "sparsity": ("auto", "none"),
            "draft_weights": ("auto", "int8", "int4"),
            "draft_weights_scope": ("all",),
            "target_kernels": ("auto", "sirius"),
        }
        for name, values in wanted.items():
            if getattr(self, name) not in values:
                raise SiriusConfigError(
                    f"{name}={getattr(self, name)!r} with offload='disk': a draft must not read the target's weights, which are "
                    f"on the disk, and those are streamed in the form of Sirius's kernel: use {name}={values[-1]!r}, or "
                    "offload='none'."
                )

    def _check_supported(self) -> None:
        if self.tree_width != 1:
            raise SiriusConfigError(
                f"tree_width={self.tree_width!r} is not supported yet: use 1, a single chain of draft tokens."
            )
        if self.sparsity == "none" and self.draft_weights == "shared":
            raise SiriusConfigError(
                "sparsity='none' with draft_weights='shared' drafts with the whole target and can only slow decoding "
                "down: use sparsity 'coarse' or 'fine', or draft_weights 'int8' or 'int4'."
            )

    @property
    def num_speculative_tokens(self) -> int:
        """Draft tokens per verification pass, vLLM's name for ``kernel_size - 1``."""
        return self.kernel_size - 1

    @property
    def draft_bits(self) -> int | None:
        """Bits of a copied weight, or ``None`` where the draft reads the target's values; not for ``auto``."""
        return {"shared": None, "int8": 8, "int4": 4}[self.draft_weights]

    def resolved(self, copies: bool, reason: str = "") -> SiriusConfig:
        """The options with ``sparsity`` and ``draft_weights`` decided.

        Args:
            copies: Whether drafts of this model read weights of their own on this machine (CPU), or the target's (GPU).
            reason: Why they cannot.

        Raises:
            SiriusConfigError: If that contradicts another option.
        """
        sparsity, weights = self.sparsity, self.draft_weights
        if self.offload == "disk" and not copies:
            raise SiriusConfigError(
                "offload='disk' needs the compiled kernels of a CPU, on which drafts read copies of their own, and this engine "
                f"cannot use them: {reason or '`vllm-sirius doctor` says why'}. Use offload='none'."
            )
        if sparsity == "auto":
            sparsity = "none" if copies and weights != "shared" else "coarse"
        if weights == "auto":
            weights = "shared" if not copies else "int4" if sparsity == "none" else "int8"
        return replace(self, sparsity=sparsity, draft_weights=weights)

    @property
    def lossless(self) -> bool:
        """Whether the output is distributed exactly as the target's."""
        return self.acceptance == "lossless"

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> SiriusConfig:
        """Builds the config from what a user wrote in the speculative config.

        An option that has a meaning only with one choice makes that choice where it was left open: ``density`` and ``refresh``
        stand for coarse sparsity, ``threshold`` and ``threshold_temperature`` for the threshold rule.

        Args:
            options: Flat mapping of options, with or without vLLM's own keys `ENGINE_OPTIONS`. Dashes in keys count as
                underscores. ``preset`` stands for the options of `PRESETS`, which all others refine.

        Returns:
            The validated config.

        Raises:
            SiriusConfigError: On an unknown key, a bad value or a contradiction.
        """
        given = {key.replace("-", "_"): value for key, value in options.items()}
        names = [field.name for field in fields(cls)]
        for key in given:
            if key not in names and key not in ENGINE_OPTIONS:
                raise SiriusConfigError(_unknown_key(key, [*names, *ENGINE_OPTIONS]))
        num_tokens = given.get("num_speculative_tokens")
        if num_tokens is not None:
            _require_int("num_speculative_tokens", num_tokens, MIN_KERNEL_SIZE - 1, MAX_KERNEL_SIZE - 1)
            kernel_size = given.setdefault("kernel_size", num_tokens + 1)
            if kernel_size != num_tokens + 1:
                raise SiriusConfigError(
                    f"kernel_size={kernel_size!r} and num_speculative_tokens={num_tokens!r} disagree: kernel_size is "
                    f"num_speculative_tokens + 1, so give one of them or kernel_size={num_tokens + 1}."
                )
        if "preset" in given:
            _require_choice("preset", given["preset"], tuple(PRESETS))
        values = {**PRESETS.get(given.get("preset", ""), {}), **given}
        if values.get("sparsity", "auto") == "auto" and any(key in values for key in COARSE_OPTIONS):
            values["sparsity"] = "coarse"
        if any(key in given for key in THRESHOLD_OPTIONS):
            values.setdefault("acceptance", "threshold")
        if values.get("offload") == "disk":
            values.setdefault("kernel_size", OFFLOAD_KERNEL_SIZE)
        config = cls(**{key: values[key] for key in names if key in values})
        config._check_contradictions(given)
        return config

    def _check_contradictions(self, given: Mapping[str, Any]) -> None:
        """Judges what the user wrote; values of a preset are only what is left where nothing was written."""
        for key in THRESHOLD_OPTIONS:
            if self.lossless and key in given:
                raise SiriusConfigError(
                    f"{key}={given[key]!r} has no meaning with acceptance='lossless': drop it, or use "
                    "acceptance='threshold'."
                )
        for key in OFFLOAD_OPTIONS:
            if self.offload == "none" and key in given:
                raise SiriusConfigError(
                    f"{key}={given[key]!r} has no meaning with offload='none', which keeps all weights in memory: drop it, or "
                    "use offload='disk'."
                )
        if self.draft_weights == "shared" and "draft_weights_scope" in given:
            raise SiriusConfigError(
                f"draft_weights_scope={self.draft_weights_scope!r} has no meaning with draft_weights='shared', which copies "
                "nothing: drop it, or use draft_weights='int8' or 'int4'."
            )
        if self.sparsity != "coarse" and "refresh" in given:
            raise SiriusConfigError(
                f"refresh={given['refresh']!r} has no meaning with sparsity={self.sparsity!r}, which keeps no set of neurons: "
                "drop it, or use sparsity='coarse'."
            )
        if self.sparsity == "none" and "density" in given:
            raise SiriusConfigError(
                f"density={given['density']!r} has no meaning with sparsity='none', which keeps all neurons: drop it, or use "
                "sparsity='coarse' or 'fine'."
            )


def _unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known options are {', '.join(sorted(known))}."
    return f"{key!r} is not an option of the speculative method 'sirius': {hint}"


def _require_int(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise SiriusConfigError(f"{name}={value!r} is not a whole number {bounds}: choose one.")


def fits_float32(number: float) -> bool:
    """Whether a number is finite in single precision, in which tensors keep it."""
    return abs(number) <= FLOAT32_MAX  # False for NaN


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits_float32(value):
        raise SiriusConfigError(
            f"{name}={value!r} is not a finite number of single precision (up to 3.4e38): give one, for example 0.5."
        )


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise SiriusConfigError(f"{name}={value!r} is not true or false: give one of the two.")


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SiriusConfigError(f"{name}={value!r} is not one of {', '.join(choices)}: choose one of them.")
