"""The named arms of the benchmarks: vLLM alone, vLLM's own speculative methods, and Sirius."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.errors import BenchmarkError
from vllm_sirius.config import SiriusConfig
from vllm_sirius.errors import SiriusConfigError

BASELINE = "vllm"
"""vLLM alone, eager: part of every run, because answers are compared with its answers."""

SIRIUS = "sirius"
COMPILED = "+compiled"
NAME = re.compile(r"[A-Za-z0-9][\w.@+=-]*")
"""Names of arms; they name log files too."""

_LOW_BIT = {"method": SIRIUS, "sparsity": "none", "draft_weights_scope": "all"}
_SHARED = {"method": SIRIUS, "density": 0.5, "acceptance": "threshold", "draft_weights": "shared"}

CATALOGUE: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "vllm-compiled": {},
    # As in vLLM's documentation; as many draft tokens as the draft model's arm.
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    # Without answers to earlier requests: repeats ask the same prompts, whose answers it would only replay.
    "suffix": {"method": "suffix", "suffix_decoding_max_cached_requests": 0},
    "draft-model": {"method": "draft_model", "num_speculative_tokens": 4},
    "default": {"method": SIRIUS},
    "threshold": {"method": SIRIUS, "acceptance": "threshold"},
    "paper": {"method": SIRIUS, "preset": "paper"},
    "coarse-shared": {**_SHARED, "sparsity": "coarse"},
    "fine-shared": {**_SHARED, "sparsity": "fine"},
    "int4-lossless": {**_LOW_BIT, "draft_weights": "int4"},
    "int8-lossless": {**_LOW_BIT, "draft_weights": "int8"},
    "int4-threshold": {**_LOW_BIT, "draft_weights": "int4", "acceptance": "threshold"},
    "int8-threshold": {**_LOW_BIT, "draft_weights": "int8", "acceptance": "threshold"},
}
"""The ``speculative_config`` of each arm; empty for vLLM alone."""

PACKAGES = {"suffix": ("arctic-inference", "arctic_inference")}
"""Package and module that a method needs and the environment may lack."""


@dataclass(frozen=True)
class Configuration:
    """One arm.

    Attributes:
        name: Its name.
        speculative_config: Its ``speculative_config``; empty for vLLM alone.
        compiled: Whether the engine compiles the model; otherwise it runs eagerly.
    """

    name: str
    speculative_config: Mapping[str, Any]
    compiled: bool = False

    @property
    def method(self) -> str:
        """Its speculative method; empty for vLLM alone."""
        return str(self.speculative_config.get("method", ""))

    @property
    def alone(self) -> bool:
        """Whether it is vLLM alone."""
        return not self.speculative_config

    @property
    def sirius(self) -> SiriusConfig | None:
        """The options of Sirius, where that is its method."""
        return SiriusConfig.from_options(self.speculative_config) if self.method == SIRIUS else None

    @property
    def kernel_size(self) -> int | None:
        """Most tokens per pass of the target; ``None`` where the method chooses it itself."""
        if self.alone:
            return 1
        if self.sirius is not None:
            return self.sirius.kernel_size
        drafted = self.speculative_config.get("num_speculative_tokens")
        return None if drafted is None else int(drafted) + 1

    @property
    def missing_package(self) -> str:
        """A package that its method needs and that is not installed; empty where nothing is missing."""
        package, module = PACKAGES.get(self.method, ("", ""))
        return package if package and importlib.util.find_spec(module) is None else ""


def choose(
    names: Sequence[str], own: Sequence[str], draft_model: str | None, compiled: bool = False
) -> list[Configuration]:
    """Finds the arms of a run.

    Args:
        names: Arms of the catalogue, as ``NAME[@K][+compiled]``.
        own: Arms that the user defines, as ``NAME=JSON``.
        draft_model: Path or hub name for the method ``draft_model``.
        compiled: Whether every arm compiles the model, whatever its name says.

    Returns:
        The arms in the order given, each once, `BASELINE` first.

    Raises:
        BenchmarkError: On an unknown arm, a bad setting or a missing draft model.
    """
    found = [_named(name, draft_model) for name in dict.fromkeys([BASELINE, *names])]
    for text in own:
        configuration = _own(text)
        if configuration.name in {*CATALOGUE, *(other.name for other in found)}:
            raise BenchmarkError(
                f"--config {configuration.name}=...: there is an arm of this name; choose another name"
            )
        found.append(configuration)
    for configuration in found:
        _check(configuration)
    return [replace(configuration, compiled=True) for configuration in found] if compiled else found


def _named(name: str, draft_model: str | None) -> Configuration:
    base, _, size = name.removesuffix(COMPILED).partition("@")
    if base not in CATALOGUE:
        raise BenchmarkError(
            f"--arms {name}: there is no such arm; choose from {', '.join(CATALOGUE)} (each with @K for a kernel size, "
            f"and with {COMPILED})"
        )
    options = dict(CATALOGUE[base])
    if base == "draft-model":
        if not draft_model:
            raise BenchmarkError(f"--arms {name}: this arm needs a second model; give its path with --draft-model")
        options["model"] = draft_model
    if "@" in name:
        _set_kernel_size(options, name, size)
    return Configuration(name, options, name.endswith(COMPILED) or base == "vllm-compiled")


def _set_kernel_size(options: dict[str, Any], name: str, size: str) -> None:
    if not options:
        raise BenchmarkError(f"--arms {name}: vLLM alone drafts nothing and has no kernel size; drop @{size}")
    if not size.isdecimal() or int(size) < 2:
        raise BenchmarkError(f"--arms {name}: @{size} is not a kernel size; give a whole number of at least 2")
    if options["method"] == SIRIUS:
        options["kernel_size"] = int(size)
    else:
        options["num_speculative_tokens"] = int(size) - 1


def _own(text: str) -> Configuration:
    name, equals, value = text.partition("=")
    if not equals or not NAME.fullmatch(name):
        raise BenchmarkError(f"--config {text}: write NAME=JSON, with a name of letters, digits, '.', '@', '+' or '-'")
    try:
        options = json.loads(value)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"--config {name}: {value!r} is not JSON ({error}); quote it for the shell") from error
    if not isinstance(options, dict) or "method" not in options:
        raise BenchmarkError(f'--config {name}: {value!r} names no method; write {{"method": "sirius", ...}}')
    return Configuration(name, options, name.endswith(COMPILED))


def _check(configuration: Configuration) -> None:
    try:
        _ = configuration.sirius
    except SiriusConfigError as error:
        raise BenchmarkError(f"arm {configuration.name}: {error}") from error
