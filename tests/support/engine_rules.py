"""Feeds each rule of `engine_support.RULES` a config that breaks it and nothing else. Runs in the child of `engine_host`."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

MODEL_ATTRIBUTES = (
    "runner_type",
    "is_encoder_decoder",
    "is_hybrid",
    "is_attention_free",
    "has_inner_state",
    "uses_mrope",
    "quantization",
    "is_moe",
    "use_mla",
    "use_fp64_gumbel",
)
SECTIONS = ("model_config", "parallel_config", "cache_config", "load_config")
PLAIN = ("use_v2_model_runner", "offload_config", "speculative_config")


def fire_every_rule(model: str) -> dict[str, Any]:
    """Breaks one thing at a time in a good engine config and collects what `check_engine` says.

    Returns:
        ``good``, the verdict on the config itself; ``fired``, the messages; ``num_rules``.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sirius.integration import engine_support

    config = EngineArgs(model=model, speculative_config={"method": "sirius"}).create_engine_config()
    drawn = copy.copy(config.speculative_config)
    drawn.sirius = dataclasses.replace(drawn.sirius, draft_sampling="probabilistic")
    assert _verdict(config, use_v2_model_runner=True, speculative_config=drawn) is None
    assert _verdict(config, use_v2_model_runner=True, model_config__use_fp64_gumbel=True) is None
    assert "offload='disk'" in str(_verdict(config, offload_config=_offload(group=4)))
    experts = {"model_config__is_moe": True, "parallel_config__data_parallel_size": 2}
    for alone in experts:
        assert _verdict(config, **{alone: experts[alone]}) is None, alone
    fired = {
        "drawn drafts": _verdict(config, use_v2_model_runner=False, speculative_config=drawn),
        "runner": _verdict(config, model_config__runner_type="pooling"),
        "encoder": _verdict(config, model_config__is_encoder_decoder=True),
        "recurrent": _verdict(config, model_config__has_inner_state=True),
        "mrope": _verdict(config, model_config__uses_mrope=True),
        "latent attention": _verdict(config, model_config__use_mla=True),
        "quantization": _verdict(config, model_config__quantization="fp8"),
        "tensor": _verdict(config, parallel_config__tensor_parallel_size=2),
        "data parallel experts": _verdict(config, **experts),
        "fp64 noise": _verdict(config, use_v2_model_runner=False, model_config__use_fp64_gumbel=True),
        "loader": _verdict(config, load_config__load_format="tensorizer"),
        "pipeline": _verdict(config, parallel_config__pipeline_parallel_size=2),
        "context": _verdict(config, parallel_config__decode_context_parallel_size=2),
        "dbo": _verdict(config, parallel_config__enable_dbo=True),
        "lora": _verdict(config, lora_config=object()),
        "connector": _verdict(config, kv_transfer_config=SimpleNamespace(kv_connector="X")),
        "fast prefill": _verdict(config, cache_config__kv_sharing_fast_prefill=True),
        "worker": _verdict(config, parallel_config__worker_cls="other.Worker"),
        "vLLM's offload on a cpu": _verdict(config, offload_config=_offload(gigabytes=2.0)),
        "watermark": _verdict(config, watermark_config=object()),
        "eplb": _verdict(config, parallel_config__enable_eplb=True),
        **_fire_rules_of_the_platform(config),
    }
    return {"good": _verdict(config), "fired": fired, "num_rules": len(engine_support.RULES)}


def _fire_rules_of_the_platform(config: Any) -> dict[str, str | None]:
    from vllm_sirius.integration import engine_support

    platform, uva = engine_support.current_platform, engine_support.is_uva_available
    gpu = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
    other = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="tpu")
    fired = {}
    try:
        engine_support.current_platform = other
        fired["platform"] = _verdict(config)
        engine_support.current_platform = gpu
        fired["v1 on a gpu"] = _verdict(config, use_v2_model_runner=False)
        engine_support.is_uva_available = lambda: False
        offload = _offload(gigabytes=1.0)
        fired["offload without uva"] = _verdict(config, use_v2_model_runner=True, offload_config=offload)
        prefetch = _offload(group=4)
        fired["prefetch"] = _verdict(config, use_v2_model_runner=True, offload_config=prefetch)
        disk = copy.copy(config.speculative_config)
        disk.sirius = dataclasses.replace(config.speculative_config.sirius, offload="disk")
        fired["disk on a gpu"] = _verdict(config, use_v2_model_runner=True, speculative_config=disk)
        good_gpu = _verdict(config, use_v2_model_runner=True, parallel_config__tensor_parallel_size=2)
        rounded = copy.copy(config.speculative_config)
        for options in ({"draft_weights": "int8"}, {"sparsity": "none"}):
            rounded.sirius = dataclasses.replace(config.speculative_config.sirius, **options)
            message = _verdict(config, use_v2_model_runner=True, speculative_config=rounded)
            assert message is not None, options
            assert next(iter(options)) in message
            fired["rounded on a gpu"] = message
    finally:
        engine_support.current_platform, engine_support.is_uva_available = platform, uva
    assert good_gpu is None, good_gpu
    return fired


def _verdict(config: Any, **changes: Any) -> str | None:
    from vllm_sirius.errors import SiriusUnsupportedError
    from vllm_sirius.integration import engine_support

    try:
        engine_support.check_engine(_view(config, **changes))
    except SiriusUnsupportedError as error:
        return str(error)
    return None


def _view(config: Any, **changes: Any) -> Any:
    """The config with some attributes (``section__name`` or ``name``) replaced."""
    sections = {section: copy.copy(getattr(config, section)) for section in SECTIONS}
    plain = {name: getattr(config, name) for name in PLAIN}
    plain |= {"lora_config": None, "kv_transfer_config": None, "watermark_config": None}
    for name, value in changes.items():
        section, _, attribute = name.partition("__")
        if attribute:
            names = MODEL_ATTRIBUTES if section == "model_config" else ()
            known = {n: getattr(sections[section], n) for n in names} if names else vars(sections[section])
            sections[section] = SimpleNamespace(**{**known, attribute: value})
        else:
            plain[name] = value
    return SimpleNamespace(**plain, **sections)


def _offload(backend: str = "auto", group: int = 0, gigabytes: float = 0.0) -> Any:
    prefetch, uva = SimpleNamespace(offload_group_size=group), SimpleNamespace(cpu_offload_gb=gigabytes)
    return SimpleNamespace(offload_backend=backend, prefetch=prefetch, uva=uva)
