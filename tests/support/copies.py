"""The draft's copies of weights: how large they are and where they lie. Runs in the child of `engine_host`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from support.probes import is_v2, model_runner
from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.weights.low_bit import LowBitRows
from vllm_sirius.weights.low_bit_panels import LowBitPanels


def drafter_of(llm: Any) -> Any:
    """The object that owns the switch between target and draft."""
    runner = model_runner(llm)
    return runner.speculator if is_v2(runner) else runner.drafter


def _tensors(copy: Any) -> Iterator[torch.Tensor]:
    if isinstance(copy, LowBitPanels):
        yield copy.blocks
    elif isinstance(copy, LowBitRows):
        yield from (copy.packed, copy.scales)
    else:
        yield copy


def copy_tensors(ffns: ReducedFFNs) -> list[torch.Tensor]:
    """All memory that drafts read instead of the target's weights."""
    backend: Any = ffns.backend
    copies = [part for pair in backend._weights for part in pair] if hasattr(backend, "_weights") else [*backend._rows]
    if ffns.linears is not None:
        copies += ffns.linears._rows
        copies += [ffns.linears.head[1]] if ffns.linears.head is not None else []
    return [tensor for copy in copies for tensor in _tensors(copy)]


def copies_report(llm: Any) -> dict[str, Any]:
    """Bytes and addresses of the copies, and which layers outside of the FFNs have one."""
    ffns = drafter_of(llm).ffns
    tensors = copy_tensors(ffns)
    linears = ffns.linears
    return {
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "addresses": [tensor.data_ptr() for tensor in tensors],
        "linears": len(linears.layers) if linears is not None else 0,
        "head": linears is not None and linears.head is not None,
    }


def doctor(model: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """What `vllm-sirius doctor` finds before any weight is loaded; not while an engine is alive."""
    from vllm_sirius.integration.inspection import inspect_model

    plan = inspect_model(model, options, {"dtype": dtype}).draft
    return {"density": plan.draft_density, "copied_bytes": plan.copied_bytes, "step_bytes": plan.step_bytes}


def reload(llm: Any, path: str, iterate: bool = False, is_checkpoint_format: bool = True) -> dict[str, Any]:
    """Loads the weights of another folder into a running engine.

    Returns:
        `copies_report` afterwards.
    """
    if not iterate:
        arguments = {"weights_path": path, "is_checkpoint_format": is_checkpoint_format}
        llm.collective_rpc("reload_weights", kwargs=arguments)
        return copies_report(llm)
    from safetensors.torch import load_file

    weights = load_file(f"{path}/model.safetensors")
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
    return copies_report(llm)


def load_past_the_engine(llm: Any, path: str) -> None:
    """Calls the model's own ``load_weights``, as training frameworks do."""
    from safetensors.torch import load_file

    model_runner(llm).model.load_weights(iter(load_file(f"{path}/model.safetensors").items()))
