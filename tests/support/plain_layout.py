"""Runs Model Runner V2 on CPU with the GPU's layout: plain weights, shared with the draft, Triton kernels interpreted.

vLLM's CPU build packs the weights of its linear layers when they are loaded. Here those of gated FFNs stay plain, as all do
on a GPU, so the target is read by `integration.load_target.read_target` and drafts through the Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch


def keep_ffn_weights_plain() -> None:
    """Puts the layout in force for engines that this process builds from now on."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner

    from vllm_sirius.integration.runner_v2.cpu_model_runner import SiriusCPUModelRunnerV2

    if SiriusCPUModelRunnerV2.load_model is CPUModelRunner.load_model:
        return
    # Without Sirius's own loading the speculator reads the loaded target itself, as on a GPU.
    SiriusCPUModelRunnerV2.load_model = CPUModelRunner.load_model
    pack = UnquantizedLinearMethod.process_weights_after_loading

    def keep(self: Any, layer: torch.nn.Module) -> None:
        if any(part in layer.prefix for part in ("mlp.", "feed_forward.")):
            layer._cpu_skip_gemm_dispatch = True
        pack(self, layer)

    UnquantizedLinearMethod.process_weights_after_loading = keep


def layout_report(llm: Any) -> dict[str, Any]:
    """Memory of the target's weights and of what the draft reads, by storages."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    weights = {storage_of(p): storage_bytes(p) for p in runner.model.parameters()}
    report = {"weight_bytes": sum(weights.values())}
    speculator = runner.speculator
    if speculator is None:
        return report
    backend = speculator.ffns.backend
    drafts = [tensor for pair in backend._weights for tensor in pair]
    report |= {
        "backend": type(backend).__name__,
        "extra_bytes": sum(storage_bytes(t) for t in drafts if storage_of(t) not in weights),
        "draft_bytes": sum({storage_of(t): storage_bytes(t) for t in drafts}.values()),
        "down_is_transposed": [not ffn.down.weight.is_contiguous() for ffn in speculator.ffns.ffns],
        "kernel_feeds_statistics": speculator.ffns.statistics is None or speculator.ffns.statistics._kernel is not None,
        "draft_calls": speculator.ffns.num_draft_calls,
        "energy": 0.0 if speculator.ffns.statistics is None else float(speculator.ffns.statistics.energy.sum()),
    }
    return report


def norms(llm: Any) -> list[float]:
    """What each neuron's activation is worth to the draft."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    values: list[float] = runner.speculator._selector._neuron_norms.tolist()
    return values


def load_ffns(llm: Any, path: str, damaged: bool = False) -> None:
    """Loads the FFNs of another folder by the model's own ``load_weights``; `damaged` with a NaN in the last layer.

    What that layer's FFN gives reaches no K/V, which would keep the damage.
    """
    from safetensors.torch import load_file

    weights = load_file(f"{path}/model.safetensors")
    if damaged:
        weights[max(name for name in weights if ".mlp." in name)][0, 0] = torch.nan
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    runner.model.load_weights((name, weight) for name, weight in weights.items() if ".mlp." in name)


def storage_of(tensor: torch.Tensor) -> int:
    """Address of the memory behind a tensor."""
    return tensor.untyped_storage().data_ptr()


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a tensor."""
    return tensor.untyped_storage().nbytes()
