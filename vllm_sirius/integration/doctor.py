"""Builds a model without its weights to say whether Sirius can serve it. Drives ``vllm.model_executor.model_loader``."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_sirius.ffn.locate import locate_gated_ffns
from vllm_sirius.integration.model_shape import ModelShape, measure_shape
from vllm_sirius.integration.speculative_config import METHOD


def inspect_model(model: str, options: dict[str, Any], engine_options: dict[str, Any]) -> ModelShape:
    """Judges a model as serving it would, short of loading weights.

    Args:
        model: Path or hub name.
        options: Knobs of Sirius, as in ``--speculative-config``.
        engine_options: Further arguments of `EngineArgs`, for example ``trust_remote_code``.

    Returns:
        Its shape.

    Raises:
        SiriusConfigError: If an option is bad.
        SiriusUnsupportedError: If the model or the set-up cannot be served.
    """
    engine_args = EngineArgs(
        model=model, enforce_eager=True, speculative_config={"method": METHOD, **options}, **engine_options
    )
    vllm_config = engine_args.create_engine_config()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        init_distributed_environment(
            world_size=1, rank=0, distributed_init_method=f"file://{folder}/rendezvous", local_rank=0, backend="gloo"
        )
        initialize_model_parallel()
        try:
            with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
                built = initialize_model(vllm_config=vllm_config)
            return measure_shape(built, locate_gated_ffns(built))
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
