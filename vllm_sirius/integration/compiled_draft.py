"""A compiled draft: a second forward of the same parameters whose FFNs are always reduced. Attaches to ``vllm.compilation``.

A compiled graph freezes every Python flag it meets, so one module cannot be compiled for target and draft both. The clone
copies only the containers on the way to an FFN; attention, norms, embeddings and projections stay the very same objects,
hence the same weights and the same KV pages, and vLLM's registry of layers does not notice.
"""

from __future__ import annotations

import copy
import types
import weakref
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.logger import init_logger

from vllm_sirius.draft.layer import ReducedFFNs
from vllm_sirius.draft.low_bit_linears import with_bias
from vllm_sirius.errors import SiriusIntegrationError

logger = init_logger("vllm.sirius")

TAG = "sirius_draft"
TRANSFORMERS_BACKEND = "vllm.model_executor.models.transformers"

STATE_OF_A_COMPILED_MODULE = (
    "aot_compiled_fn",
    "_compiled_callable",
    "_bytecode_hook_handle",
    "_compiled_bytecode",
    "_aot_compilation_path",
    "_aot_cache_dir",
)


def can_compile(model: nn.Module, ffns: ReducedFFNs, vllm_config: Any) -> bool:
    """Whether a compiled clone is possible and worth its compilation.

    Not where the engine runs eagerly, where drafts are masked (nothing is gained then), where the model has no part that
    vLLM compiles, and for models of vLLM's Transformers backend, which binds forwards to modules: a clone would share them.

    Args:
        model: The target.
        ffns: The switch.
        vllm_config: The engine's config.
    """
    mode = vllm_config.compilation_config.mode
    if mode in (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE) or ffns.backend is None:
        return False
    if any(cls.__module__.startswith(TRANSFORMERS_BACKEND) for cls in type(model).__mro__):
        logger.info("Sirius: the draft runs uncompiled, because vLLM runs this model by its Transformers backend")
        return False
    return any(_is_compiled(module) for module in model.modules())


def clone_draft(model: nn.Module, ffns: ReducedFFNs, vllm_config: Any) -> nn.Module:
    """Makes the clone; it compiles at its first call, which must not be one that serves a request.

    Args:
        model: The target, with the switch installed.
        ffns: The switch, with native kernels.
        vllm_config: The engine's config.

    Returns:
        A model with the target's parameters and interface.

    Raises:
        SiriusIntegrationError: If a container on the way to an FFN has a forward of its own instance, which the clone would
            share and which leads back to the dense target.
    """
    copies = {id(ffn.module): _reduced(ffn.module, layer) for layer, ffn in enumerate(ffns.ffns)}
    if ffns.linears is not None:
        for index, linear in enumerate(ffns.linears.layers):
            copies[id(linear)] = _low_bit(linear, index, ffns.linears.num_outputs(index))
    clone = _clone(model, copies, vllm_config)
    assert clone is not model
    return clone


def release_with(owner: object, clone: nn.Module) -> None:
    """Lets a clone go when its owner does.

    Upstream's hook of a compiled module keeps the module alive; when an engine ends it takes the target's away, and knows
    nothing of the clone's.

    Args:
        owner: What uses the clone and is not referred to by it.
        clone: The clone.
    """
    for module in clone.modules():
        handle = vars(module).get("_bytecode_hook_handle")
        if handle is not None and vars(module).get("_compile_tag") == TAG:
            weakref.finalize(owner, handle.remove)


def _clone(module: nn.Module, copies: dict[int, nn.Module], vllm_config: Any) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    replaced = {}
    for name, child in module.named_children():
        found = _clone(child, copies, vllm_config)
        if found is not child:
            replaced[name] = found
    if not replaced:
        return module
    clone = _shallow_copy(module)
    clone._modules.update(replaced)
    if _is_compiled(module):
        _compile_anew(clone, vllm_config)
    return clone


def _shallow_copy(module: nn.Module) -> nn.Module:
    if "forward" in vars(module):
        raise SiriusIntegrationError(
            f"{type(module).__name__} has a forward of its own instance (an offloader or another plugin put it there), so its "
            "draft would run dense: drop that option, or set enforce_eager, which drafts without a clone."
        )
    clone = copy.copy(module)
    for registry in ("_modules", "_parameters", "_buffers"):
        vars(clone)[registry] = dict(vars(module)[registry])
    return clone


def _reduced(module: nn.Module, layer: int) -> nn.Module:
    """A copy of an FFN that only knows the reduced way; its parameters are the target's."""

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output: torch.Tensor = torch.ops.vllm_sirius.reduced_ffn(flat, layer)
        return output.view(hidden_states.shape)

    copied = _shallow_copy(module)
    copied.__class__ = type(f"Draft{type(module).__name__}", (type(module),), {"forward": forward})
    return copied


def _low_bit(module: nn.Module, index: int, num_outputs: int) -> nn.Module:
    """A copy of a linear layer that only knows its quantised copy."""

    def forward(self: nn.Module, inputs: torch.Tensor) -> Any:
        return with_bias(self, torch.ops.vllm_sirius.low_bit_linear(inputs, index, num_outputs))

    copied = _shallow_copy(module)
    copied.__class__ = type(f"Draft{type(module).__name__}", (type(module),), {"forward": forward})
    return copied


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, TorchCompileWithNoGuardsWrapper) and not getattr(module, "do_not_compile", True)


def _compile_anew(clone: nn.Module, vllm_config: Any) -> None:
    """Gives a cloned container a compiled callable and an artifact key of its own.

    Upstream's key for artifacts on disk has the name of the forward function and no model tag, so without a new name the
    clone would load the target's dense artifact.
    """
    clone.__class__ = _with_renamed_forward(type(clone))
    state = vars(clone)
    for name in STATE_OF_A_COMPILED_MODULE:
        state.pop(name, None)
    state["was_aot_compile_fn_loaded_from_disk"] = False
    state["compiled"] = False
    state["_compile_tag"] = TAG
    with set_current_vllm_config(vllm_config), set_model_tag(TAG):
        TorchCompileWithNoGuardsWrapper.__init__(clone, compile_prefix="", is_encoder=False)


def _with_renamed_forward(upstream: type) -> type:
    original: Any = upstream.forward  # type: ignore[attr-defined]
    forward = types.FunctionType(
        original.__code__.replace(co_name=original.__name__),
        original.__globals__,
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    forward.__kwdefaults__ = original.__kwdefaults__
    forward.__annotations__ = original.__annotations__
    forward.__qualname__ = f"{original.__qualname__}[{TAG}]"
    forward.__module__ = original.__module__
    return type(f"Draft{upstream.__name__}", (upstream,), {"forward": forward, "__module__": upstream.__module__})
