"""Builds a model without its weights to say whether Sirius can serve it. Drives ``vllm.model_executor.model_loader``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.errors import ModelError, SiriusError, one_line
from vllm_sirius.integration.draft_plan import DraftPlan, choose_packed_kernels, plan_draft, why_no_kernel
from vllm_sirius.integration.offload_budget import weight_budget
from vllm_sirius.integration.offload_parts import find_parts_to_offload
from vllm_sirius.integration.speculative_config import METHOD
from vllm_sirius.integration.weight_readers import PackedReader, PlainReader, want_panels
from vllm_sirius.kernels.native import KernelChoice, choose_kernels
from vllm_sirius.offload.plan import MemoryPlan, plan_memory


@dataclass(frozen=True)
class InspectedModel:
    """What serving a model would come to.

    Attributes:
        draft: What its drafts will copy and read.
        memory: Where its weights will lie, or ``None`` if all of them are loaded into memory.
    """

    draft: DraftPlan
    memory: MemoryPlan | None


def inspect_model(model: str, options: dict[str, Any], engine_options: dict[str, Any]) -> InspectedModel:
    """Judges a model as serving it would, short of loading weights.

    Args:
        model: Path or hub name.
        options: Options of Sirius, as in ``--speculative-config``.
        engine_options: Further arguments of `EngineArgs`, for example ``trust_remote_code``.

    Returns:
        What it comes to.

    Raises:
        SiriusConfigError: If an option is bad.
        SiriusUnsupportedError: If the model or the set-up cannot be served.
        OffloadError: If its weights do not fit into the budget that was given.
        ModelError: If vLLM itself cannot serve the model.
    """
    with _reason_in_one_line(model):
        return _inspect(model, options, engine_options)


@contextmanager
def _reason_in_one_line(model: str) -> Iterator[None]:
    """Whatever vLLM and the libraries below it raise about a model becomes one sentence."""
    try:
        yield
    except SiriusError:
        raise
    except Exception as error:
        raise ModelError(f"vLLM cannot serve {model}: {one_line(error)}") from error


def _inspect(model: str, options: dict[str, Any], engine_options: dict[str, Any]) -> InspectedModel:
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
            reader = PackedReader() if current_platform.is_cpu() else PlainReader()
            plan = plan_draft(vllm_config, built, _choose_kernels, reader)
            memory = None
            if plan.config.offload == "disk" and isinstance(reader, PackedReader):
                want_panels(built, plan.parts.head, reader)
                sizes = find_parts_to_offload(built, plan, reader).sizes(built, plan.copied_bytes)
                budget = weight_budget(vllm_config, plan.config.offload_budget_gb)
                memory = plan_memory(sizes, plan.config.offload_buffers, budget)
            return InspectedModel(plan, memory)
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def _choose_kernels(vllm_config: Any, ffns: list[GatedFFN]) -> KernelChoice:
    if current_platform.is_cpu():
        return choose_packed_kernels(vllm_config, ffns)
    reason = why_no_kernel(ffns)
    return KernelChoice(not reason, reason or "triton")


def describe_model(model: str, options: dict[str, Any], engine_options: dict[str, Any]) -> dict[str, Any]:
    """What is known of a model, its drafts and the machine before an engine starts.

    Args:
        model: Path or hub name.
        options: Options of Sirius, as in ``--speculative-config``.
        engine_options: Further arguments of `EngineArgs`.

    Returns:
        JSON values, the fields of `vllm_sirius.measuring.inspection.Inspection`.

    Raises:
        SiriusConfigError: If an option is bad.
        SiriusUnsupportedError: If the model or the set-up cannot be served.
        ModelError: If vLLM itself cannot serve the model.
    """
    plan = inspect_model(model, options, engine_options).draft
    with _reason_in_one_line(model):
        config = EngineArgs(model=model, enforce_eager=True, **engine_options).create_engine_config()
    served, parallel = config.model_config, config.parallel_config
    heads = served.get_num_layers(parallel) * served.get_num_kv_heads(parallel)
    no_low_bit = "they exist on CPU only"
    if current_platform.is_cpu():
        kernels = choose_kernels(served.dtype, torch.device("cpu"))
        no_low_bit = "" if kernels.native else kernels.reason
    return {
        "platform": current_platform.device_name,
        "dtype": str(served.dtype).removeprefix("torch."),
        "no_low_bit": no_low_bit,
        "max_model_len": served.max_model_len,
        "kv_bytes_per_token": 2 * heads * served.get_head_size() * served.dtype.itemsize,
        "gated_ffns": len(plan.ffns),
        "neurons": plan.num_neurons,
        "step_bytes": plan.step_bytes,
        "ffn_share": plan.ffn_share,
        "draft_density": plan.draft_density,
        "copied_bytes": plan.copied_bytes,
    }
