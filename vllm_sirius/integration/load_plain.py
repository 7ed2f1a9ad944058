"""Reading a target whose weights stay as they were loaded (GPU): the draft shares them, nothing is copied.

A neuron's gate and up weights are rows of the merged projection already. Its down weights are a column; they are stored
once as rows instead, and the target reads the transposed view, which matrix libraries multiply by at the same speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_sirius.draft.backends import TritonBackend
from vllm_sirius.draft.locate import GatedFFN
from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.draft_plan import DraftPlan, plan_draft, why_no_kernel
from vllm_sirius.integration.finite_weights import check_layers
from vllm_sirius.integration.reload import TargetReload
from vllm_sirius.integration.target import LoadedTarget, with_true_kernels
from vllm_sirius.kernels.native import KernelChoice, choose_triton
from vllm_sirius.kernels.triton.statistics import observe_ffn
from vllm_sirius.weights.rows import neuron_norms, store_as_rows


def read_target(model: nn.Module, vllm_config: Any) -> LoadedTarget:
    """Reads a loaded target and stores its down projections as rows.

    Args:
        model: The target.
        vllm_config: The engine's config.

    Returns:
        The target.

    Raises:
        SiriusUnsupportedError: If the model has no gated FFN, or one whose weights cannot be read.
    """
    given = vllm_config.speculative_config.sirius
    plan = plan_draft(vllm_config, model, lambda _, ffns: _choose_kernels(ffns), packed=False)
    config, ffns, kernels = plan.config, plan.ffns, plan.kernels
    if config.target_kernels == "sirius":
        raise SiriusUnsupportedError(
            "target_kernels='sirius' is for CPU: use 'auto' or 'vllm', which are the same here."
        )
    if config.draft_bits is not None:
        raise SiriusUnsupportedError(
            f"draft_weights={config.draft_weights!r} is for CPU so far: use draft_weights='shared', which costs no memory here."
        )
    for ffn in ffns:
        _check_readable(ffn)
    check_layers(_layers(plan), model)
    norms = torch.cat([neuron_norms(_weight(ffn.down)) for ffn in ffns])
    reload = TargetReload(model, lambda: _measure_norms(plan, model, norms), version=lambda: _version(ffns))
    if not kernels.native:
        return LoadedTarget(model, plan, norms, None, kernels, reload)
    backend = TritonBackend(
        ffns,
        [_weight(ffn.gate_up) for ffn in ffns],
        [store_as_rows(ffn.down) for ffn in ffns],
        [_reduction(ffn.down) for ffn in ffns],
    )
    backend.warm_up(config.density, config.sparsity == "fine")
    target = LoadedTarget(model, plan, norms, backend, kernels, reload, observe_ffn)
    return with_true_kernels(target, vllm_config, given)


def _measure_norms(plan: DraftPlan, model: nn.Module, norms: torch.Tensor) -> None:
    """Overwrites the neurons' norms in place: the one thing that is derived from shared weights."""
    for ffn, part in zip(plan.ffns, norms.split([ffn.num_neurons for ffn in plan.ffns]), strict=True):
        part.copy_(neuron_norms(_weight(ffn.down)))
    check_layers(_layers(plan), model)


def _version(ffns: list[GatedFFN]) -> int:
    """Changes when a weight is written to in place, as a reload of weights in the engine's own format does."""
    weights: list[Any] = [ffn.down.weight for ffn in ffns]
    return sum(0 if weight.is_inference() else weight._version for weight in weights)


def _layers(plan: DraftPlan) -> dict[str, Any]:
    return {f"{ffn.name}.{part}": getattr(ffn, part) for ffn in plan.ffns for part in ("gate_up", "down")}


def _weight(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.data
    return weight


def _check_readable(ffn: GatedFFN) -> None:
    for layer, shape in (
        (ffn.gate_up, (2 * ffn.num_neurons, ffn.hidden_size)),
        (ffn.down, (ffn.hidden_size, ffn.num_neurons)),
    ):
        method: Any = getattr(layer, "quant_method", None)
        found = tuple(_weight(layer).shape)
        if type(method) is not UnquantizedLinearMethod or found != shape:
            raise SiriusUnsupportedError(
                f"the FFN {ffn.name!r} stores its weights by {type(method).__name__} as {list(found)}, whose rows cannot be "
                "read: serve the unquantised checkpoint."
            )


def _reduction(down: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What turns this rank's part of the down projection into the whole, or ``None`` where it is the whole."""
    if down.tp_size > 1 and down.reduce_results:
        return tensor_model_parallel_all_reduce
    return None


def _choose_kernels(ffns: list[GatedFFN]) -> KernelChoice:
    reason = why_no_kernel(ffns)
    if reason:
        return KernelChoice(False, reason)
    return choose_triton(_weight(ffns[0].gate_up))
