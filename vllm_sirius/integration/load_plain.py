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

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.ffn.backends import TritonBackend
from vllm_sirius.ffn.kernels.native import KernelChoice, choose_triton
from vllm_sirius.ffn.kernels.triton.statistics import observe_ffn
from vllm_sirius.ffn.locate import GatedFFN, locate_gated_ffns
from vllm_sirius.ffn.weights import neuron_norms, store_as_rows
from vllm_sirius.integration.model_shape import measure_shape
from vllm_sirius.integration.speculative_config import resolve_draft
from vllm_sirius.integration.target import LoadedTarget, check_activations, with_true_kernels


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
    config = resolve_draft(vllm_config, copies=False)
    ffns = locate_gated_ffns(model)
    check_activations(config, ffns)
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
    shape = measure_shape(model, ffns)
    norms = torch.cat([neuron_norms(_weight(ffn.down)) for ffn in ffns])
    kernels = _choose_kernels(ffns)
    if not kernels.native:
        return LoadedTarget(model, ffns, shape, norms, None, kernels)
    backend = TritonBackend(
        ffns,
        [_weight(ffn.gate_up) for ffn in ffns],
        [store_as_rows(ffn.down) for ffn in ffns],
        [_reduction(ffn.down) for ffn in ffns],
    )
    backend.warm_up(config.density, config.sparsity == "fine")
    target = LoadedTarget(model, ffns, shape, norms, backend, kernels, observe_ffn)
    return with_true_kernels(target, vllm_config, given)


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
    if any(ffn.activation is None for ffn in ffns):
        return KernelChoice(False, "activation without a kernel")
    if any(getattr(layer, "bias", None) is not None for ffn in ffns for layer in (ffn.gate_up, ffn.down)):
        return KernelChoice(False, "FFN with bias")
    return choose_triton(_weight(ffns[0].gate_up))
