"""Sirius as a registered speculative method. Attaches to ``vllm.plugins.speculative_methods``.

Only a vLLM with the source patches in ``patches/`` has that module. There every function of Sirius that a hook would put
in is called by vLLM itself, and no hook is installed.
"""

from __future__ import annotations

import importlib
from typing import Any

from vllm_sirius.errors import SiriusIntegrationError
from vllm_sirius.integration import engine_args, engine_support, lookahead, sampling_params
from vllm_sirius.integration.runner_v2 import init_speculator
from vllm_sirius.integration.speculative_config import METHOD

REGISTRY = "vllm.plugins.speculative_methods"


class SiriusMethod:
    """What the registry asks of a method; the arguments are those of the functions that each hook uses.

    Attributes:
        supports_async_scheduling: True, because drafts stay on the device until they are verified.
    """

    supports_async_scheduling = True

    def create_config(self, options: dict[str, Any], target_model_config: Any, target_parallel_config: Any) -> Any:
        """Builds the speculative config; see `engine_args.create_config`."""
        return engine_args.create_config(options, target_model_config, target_parallel_config)

    def check_engine(self, vllm_config: Any) -> None:
        """Refuses a set-up that cannot be served, and names the worker class; see `engine_support`."""
        engine_support.check_engine(vllm_config)
        engine_support.choose_worker(vllm_config)
        engine_support.choose_scheduler(vllm_config)

    def num_lookahead_tokens(self, speculative_config: Any) -> int:
        """KV slots that the draft writes past the text; see `lookahead.num_lookahead_tokens`."""
        return lookahead.num_lookahead_tokens(speculative_config)

    def check_sampling_params(self, params: Any, speculative_config: Any) -> None:
        """Judges the options of a request; see `sampling_params.check_sampling_params`."""
        sampling_params.check_sampling_params(params, speculative_config)

    def make_speculator(self, vllm_config: Any, device: Any, req_states: Any) -> Any:
        """Builds the speculator of Model Runner V2, which keeps its own table of requests."""
        return init_speculator.make_speculator(vllm_config, device)


_SIRIUS = SiriusMethod()


def register() -> bool:
    """Registers Sirius where vLLM has the registry. Repeating it is harmless.

    Returns:
        Whether it has.

    Raises:
        SiriusIntegrationError: If another plugin has registered the name.
    """
    registry = _registry()
    if registry is None:
        return False
    try:
        registry.register_speculative_method(METHOD, _SIRIUS)
    except ValueError as error:
        raise SiriusIntegrationError(f"{error} Uninstall the other plugin, or leave it out by VLLM_PLUGINS.") from error
    return True


def is_registered() -> bool:
    """Whether vLLM calls Sirius by its registry in this process, so that hooks must not be installed."""
    registry = _registry()
    return registry is not None and registry.get_speculative_method(METHOD) is _SIRIUS


def _registry() -> Any:
    try:
        return importlib.import_module(REGISTRY)
    except ModuleNotFoundError:
        return None
