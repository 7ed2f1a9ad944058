"""The doors of configuration. Attaches to ``vllm.engine.arg_utils``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from vllm_sirius.errors import SiriusConfigError
from vllm_sirius.integration import engine_support, speculative_config
from vllm_sirius.integration.hook_engine import Hook
from vllm_sirius.method import METHOD, asks_for_sirius


def _options(engine_args: Any) -> dict[str, Any]:
    """Merges the JSON option with the short flags, under upstream's rule that one thing is said once."""
    options = dict(engine_args.speculative_config or {})
    flags = {
        "--spec-method": ("method", engine_args.spec_method),
        "--spec-model": ("model", engine_args.spec_model),
        "--spec-tokens": ("num_speculative_tokens", engine_args.spec_tokens),
    }
    for flag, (key, value) in flags.items():
        if value is None:
            continue
        if key in options:
            raise SiriusConfigError(
                f"{flag}={value!r} and --speculative-config[{key!r}]={options[key]!r} are mutually exclusive: give one."
            )
        options[key] = value
    return {key.replace("-", "_"): value for key, value in options.items()}


def create_config(options: dict[str, Any], target_model_config: Any, target_parallel_config: Any) -> Any:
    """Builds the speculative config of an engine that was asked for Sirius.

    Args:
        options: What the user gave, flags included.
        target_model_config: The target's model config.
        target_parallel_config: The target's parallel config.

    Returns:
        The `SiriusSpeculativeConfig`.

    Raises:
        SiriusConfigError: If an option is bad, or names another method or a draft model as well.
    """
    for key in ("method", "model"):
        if options.get(key, METHOD) != METHOD:
            raise SiriusConfigError(
                f"{key}={options[key]!r} contradicts the speculative method 'sirius', which drafts with the target itself: "
                f"drop {key!r}."
            )
    return speculative_config.create(options, target_model_config, target_parallel_config)


def _create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        if not asks_for_sirius(self):
            return original(self, target_model_config, target_parallel_config)
        return create_config(_options(self), target_model_config, target_parallel_config)

    return wrapper


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        if speculative_config.sirius_config(vllm_config.speculative_config) is not None:
            engine_support.check_engine(vllm_config)
            engine_support.choose_worker(vllm_config)
            engine_support.choose_scheduler(vllm_config)
        return vllm_config

    return wrapper


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(parser: Any) -> Any:
        parser = original(parser)
        for action in parser._actions:
            if action.dest == "spec_method" and action.choices is not None and METHOD not in action.choices:
                action.choices = [*action.choices, METHOD]
        # A second name for an existing option; without SUPPRESS its own default would override --spec-model's value.
        for flag, dest, kind in (
            ("--speculative-model", "spec_model", str),
            ("--num-speculative-tokens", "spec_tokens", int),
        ):
            if flag not in parser._option_string_actions:
                parser.add_argument(
                    flag, dest=dest, type=kind, default=argparse.SUPPRESS, help=f"Same as --{dest.replace('_', '-')}."
                )
        return parser

    return wrapper


HOOKS = (
    Hook(
        target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        make=_create_speculative_config,
        fingerprint="489aa2fc045a",
        why="`SpeculativeConfig.method` is a closed list and its constructor loads a draft model.",
        untouched="the method or model named is not 'sirius'",
        remove_when="upstream lets a plugin register a speculative method with its own config class",
    ),
    Hook(
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        make=_create_engine_config,
        fingerprint="b9b94288f46d",
        why="Set-ups that Sirius cannot serve must be refused before weights load, and its worker class must be chosen.",
        untouched="the speculative config is not Sirius's",
        remove_when="upstream calls a validation method of the speculative config with the whole engine config",
    ),
    Hook(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        make=_add_cli_args,
        fingerprint="0b7444570415",
        why="`--spec-method` must accept 'sirius', and the legacy flags --speculative-model and --num-speculative-tokens "
        "are gone upstream.",
        untouched="always: the parser only gains one choice and two names for existing options",
        remove_when="upstream builds the choices of --spec-method from a registry",
    ),
)
