"""Which engine set-ups Sirius can serve, and the worker that serves them. Attaches to ``vllm.config.VllmConfig``.

Everything here runs in the process that starts the engine, before any weight is read. What only the model's modules can
tell is checked in the worker, after they are built and before their weights load (`draft.locate`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.platform_utils import is_uva_available

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.speculative_config import fix_lengths, sirius_config

logger = init_logger("vllm.sirius")

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
SIRIUS_CPU_WORKER = "vllm_sirius.integration.cpu_worker.SiriusCPUWorker"

SIRIUS_SCHEDULERS = {
    False: "vllm_sirius.integration.scheduler.SiriusScheduler",
    True: "vllm_sirius.integration.scheduler.SiriusAsyncScheduler",
}
"""By whether scheduling is async."""

WORKERS = (CPU_WORKER, SIRIUS_CPU_WORKER, "vllm.v1.worker.gpu_worker.Worker")


def _probabilistic(config: Any) -> bool:
    sirius = sirius_config(config.speculative_config)
    return sirius is not None and sirius.draft_sampling == "probabilistic"


def _offloaded(config: Any) -> bool:
    sirius = sirius_config(config.speculative_config)
    return sirius is not None and sirius.offload == "disk"


def _copied_weights(config: Any) -> str | None:
    """The option that asks for quantised weights."""
    sirius = sirius_config(config.speculative_config)
    if sirius is None or sirius.draft_weights == "shared":
        return None
    if sirius.draft_weights == "auto":
        return "sparsity='none'" if sirius.sparsity == "none" else None
    return f"draft_weights={sirius.draft_weights!r}"


OWN_WAY_FORMATS = ("ipc_cache", "modelexpress", "tensorizer")
"""Load formats of vLLM whose loaders do not build and process a model as `BaseModelLoader.load_model` does."""

Rule = tuple[Callable[[Any], Any], str]
"""Reads the offending value out of a `VllmConfig` (falsy if there is none), and says reason and remedy with ``{value}``."""

RULES: tuple[Rule, ...] = (
    (
        lambda c: not (current_platform.is_cpu() or current_platform.is_cuda()) and current_platform.device_name,
        "platform {value}: Sirius runs on CPU and on CUDA GPUs; serve without --speculative-model sirius.",
    ),
    (
        lambda c: not current_platform.is_cpu() and not c.use_v2_model_runner and "V1",
        (
            "Model Runner {value} on a GPU: Sirius drafts there on Model Runner V2 alone; unset VLLM_USE_V2_MODEL_RUNNER, or "
            "drop the option that vLLM names in its log as unsupported by V2."
        ),
    ),
    (
        lambda c: not c.use_v2_model_runner and _probabilistic(c) and "V1",
        "draft_sampling='probabilistic' on Model Runner {value}: only V2 draws drafts; use draft_sampling='greedy'.",
    ),
    (
        lambda c: not c.use_v2_model_runner and c.model_config.use_fp64_gumbel,
        (
            "use_fp64_gumbel={value} on Model Runner V1: vLLM then draws tokens by other random numbers than those that "
            "drafted tokens are judged by, so that a seed would not keep its answer; use use_fp64_gumbel=False."
        ),
    ),
    (
        lambda c: not current_platform.is_cpu() and _copied_weights(c),
        (
            "{value}: quantised copies have kernels for CPU alone so far; use draft_weights='shared', which costs no memory on "
            "a GPU, with sparsity='coarse' or 'fine'."
        ),
    ),
    (
        lambda c: c.model_config.runner_type != "generate" and c.model_config.runner_type,
        "runner={value}: Sirius speeds up text generation only; drop the speculative config.",
    ),
    (
        lambda c: c.model_config.is_encoder_decoder,
        "is_encoder_decoder={value}: cross-attention models are not supported; drop the speculative config.",
    ),
    (
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free or c.model_config.has_inner_state,
        (
            "has_inner_state={value}: a recurrent (Mamba-like) state cannot be rolled back after a rejected draft; drop the "
            "speculative config for this model."
        ),
    ),
    (
        lambda c: current_platform.is_cpu() and c.model_config.use_mla,
        (
            "use_mla={value} on CPU: vLLM's latent attention (MLA) gives other answers there when several tokens are verified at "
            "once, with any speculative method; drop the speculative config for this model."
        ),
    ),
    (
        lambda c: c.model_config.uses_mrope or getattr(c.model_config, "uses_xdrope_dim", 0),
        "uses_mrope={value}: multi-dimensional rotary positions are not drafted yet; drop the speculative config.",
    ),
    (
        lambda c: c.model_config.quantization,
        "quantization={value!r}: the FFN rows of quantised weights cannot be read yet; serve the unquantised checkpoint.",
    ),
    (
        lambda c: (
            current_platform.is_cpu() and c.load_config.load_format in OWN_WAY_FORMATS and c.load_config.load_format
        ),
        (
            "load_format={value!r}: its loader builds the model and fills it in its own way, so that the draft's copies cannot "
            "be made of the plain weights; use load_format 'auto', 'safetensors', 'sharded_state' or 'runai_streamer'."
        ),
    ),
    (
        lambda c: c.parallel_config.pipeline_parallel_size > 1 and c.parallel_config.pipeline_parallel_size,
        "pipeline_parallel_size={value}: the draft needs all layers on one rank; use 1, or on a GPU --tensor-parallel-size.",
    ),
    (
        lambda c: (
            current_platform.is_cpu()
            and c.parallel_config.tensor_parallel_size > 1
            and c.parallel_config.tensor_parallel_size
        ),
        (
            "tensor_parallel_size={value} on CPU: each rank would decide by its own clock how far to draft, and wait for ever "
            "where another decides otherwise. Ranks that agree come later; use tensor_parallel_size=1, or drop the speculative "
            "config."
        ),
    ),
    (
        lambda c: (
            current_platform.is_cpu()
            and c.model_config.is_moe
            and c.parallel_config.data_parallel_size > 1
            and c.parallel_config.data_parallel_size
        ),
        (
            "data_parallel_size={value} on CPU with a mixture of experts: its ranks meet in every pass, and each would decide by "
            "its own clock how far to draft and wait for ever where another decides otherwise. Ranks that agree come later; use "
            "data_parallel_size=1 or several engines, or drop the speculative config."
        ),
    ),
    (
        lambda c: c.parallel_config.decode_context_parallel_size > 1 and c.parallel_config.decode_context_parallel_size,
        "decode_context_parallel_size={value}: the draft cannot split its K/V over ranks; use 1.",
    ),
    (
        lambda c: c.parallel_config.enable_dbo,
        "enable_dbo={value}: dual batch overlap does not work with speculative decoding; drop --enable-dbo.",
    ),
    (
        lambda c: c.lora_config is not None and "given",
        "enable_lora={value}: the draft would run without the adapter; merge the adapter into the weights or drop --enable-lora.",
    ),
    (
        lambda c: c.kv_transfer_config is not None and c.kv_transfer_config.kv_connector,
        "kv_connector={value!r}: draft passes must not be sent to other engines, not handled yet; drop --kv-transfer-config.",
    ),
    (
        lambda c: not current_platform.is_cpu() and _offloaded(c) and "disk",
        "offload={value!r}: weights are streamed to a CPU alone so far; on a GPU vLLM's --cpu-offload-gb keeps some on the host.",
    ),
    (
        lambda c: (
            current_platform.is_cpu()
            and (c.offload_config.prefetch.offload_group_size or c.offload_config.uva.cpu_offload_gb)
            and f"{c.offload_config.uva.cpu_offload_gb:g}, offload_group_size={c.offload_config.prefetch.offload_group_size}"
        ),
        (
            "cpu_offload_gb={value}: these options of vLLM move weights between a GPU and its host, and do nothing on a CPU; for "
            "a model that does not fit into memory use offload='disk' with offload_budget_gb, in the speculative config."
        ),
    ),
    (
        lambda c: c.offload_config.offload_backend != "uva" and c.offload_config.prefetch.offload_group_size,
        (
            "offload_group_size={value}: prefetched weights lie in slots that rotate once per pass, which drafts would read at "
            "the wrong moment; use --cpu-offload-gb instead."
        ),
    ),
    (
        lambda c: c.offload_config.uva.cpu_offload_gb and not current_platform.is_cpu() and not is_uva_available(),
        (
            "cpu_offload_gb={value}: this machine has no unified addressing, so vLLM copies offloaded weights for every pass, "
            "which the draft's kernels cannot read; drop --cpu-offload-gb."
        ),
    ),
    (
        lambda c: getattr(c, "watermark_config", None) is not None and "given",
        "watermark_config={value}: watermarks and Sirius's acceptance rules contradict each other; drop one of the two.",
    ),
    (
        lambda c: c.parallel_config.enable_eplb,
        "enable_eplb={value}: the draft's passes would be counted as load of the experts; drop --enable-eplb.",
    ),
    (
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "kv_sharing_fast_prefill={value}: the neuron statistic needs the prompt in every layer; drop --kv-sharing-fast-prefill.",
    ),
    (
        lambda c: c.parallel_config.worker_cls not in WORKERS and c.parallel_config.worker_cls,
        (
            "worker_cls={value!r}: Sirius brings its own worker and cannot share an engine with another one; drop --worker-cls "
            "or the plugin that sets it."
        ),
    ),
)


def check_engine(vllm_config: Any) -> None:
    """Refuses an engine set-up that Sirius cannot serve.

    Args:
        vllm_config: The complete engine config.

    Raises:
        SiriusUnsupportedError: With the option, its value and the remedy.
    """
    for find, text in RULES:
        value = find(vllm_config)
        if value:
            raise SiriusUnsupportedError("speculative method 'sirius' with " + text.format(value=value))


def choose_worker(vllm_config: Any) -> None:
    """Names the worker class that drafts on CPU; a GPU's own worker needs no change. Arguments as in `check_engine`."""
    if current_platform.is_cpu():
        vllm_config.parallel_config.worker_cls = SIRIUS_CPU_WORKER


def choose_scheduler(vllm_config: Any) -> None:
    """Names the scheduler class that chooses draft lengths on Model Runner V2; on V1 the worker does, request by request.

    Args:
        vllm_config: The engine's config.
    """
    scheduler = vllm_config.scheduler_config
    speculative = vllm_config.speculative_config
    if speculative.adaptive_lengths is None:
        return
    if not vllm_config.use_v2_model_runner:
        fix_lengths(speculative)
    elif scheduler.scheduler_cls in SIRIUS_SCHEDULERS.values():
        return
    elif scheduler.scheduler_cls is not None:
        logger.warning(
            "Sirius: drafts have a fixed length, because scheduler_cls=%s is in use", scheduler.scheduler_cls
        )
        fix_lengths(speculative)
    else:
        scheduler.scheduler_cls = SIRIUS_SCHEDULERS[bool(scheduler.async_scheduling)]
