"""Ways to load a model that are not vLLM's default. Runs in the child of `engine_host`."""

from __future__ import annotations

import tempfile
from typing import Any


def register_loaders() -> None:
    """Adds two load formats with a ``load_model`` of their own: one keeps to upstream's seam, the other does not."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    class Plain(DefaultModelLoader):
        """Reads what the default loader reads; the format's name means nothing to that one."""

        def __init__(self, load_config: Any) -> None:
            self.load_config = load_config
            super().__init__(type(load_config)(load_format="auto"))

    @register_model_loader("by_create_model")
    class ByCreateModel(Plain):
        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            with set_default_torch_dtype(model_config.dtype):
                model = self.create_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
                self.load_weights(model, model_config)
                process_weights_after_loading(model, model_config, vllm_config.device_config.device)
            return model.eval()

    @register_model_loader("by_itself")
    class ByItself(Plain):
        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            with set_default_torch_dtype(model_config.dtype):
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
                self.load_weights(model, model_config)
                process_weights_after_loading(model, model_config, vllm_config.device_config.device)
            return model.eval()


def save_sharded(model: str, folder: str) -> None:
    """Writes a model in the format of ``sharded_state``, as an engine with plain weights would; not beside an engine."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import ShardedStateLoader, get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(model=model, dtype="float32", enforce_eager=True).create_engine_config()
    with tempfile.TemporaryDirectory() as scratch, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{scratch}/rendezvous", 0, "gloo")
        initialize_model_parallel()
        try:
            with set_default_torch_dtype(config.model_config.dtype):
                built = initialize_model(vllm_config=config)
            get_model_loader(config.load_config).load_weights(built, config.model_config)
            ShardedStateLoader.save_model(built, folder)
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
