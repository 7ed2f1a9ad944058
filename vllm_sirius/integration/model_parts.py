"""What a decoding step of any vLLM model reads, found by structure. Reads modules of ``vllm.model_executor.layers``.

The lm_head is the module from which the model computes its logits, whatever its name and class: models with tied embeddings
may have none of their own. The layers are what lies in the same list of modules as the FFNs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_sirius.draft.locate import GatedFFN, language_model, locate_gated_ffns


@dataclass(frozen=True)
class ModelParts:
    """Modules of a decoding step that a draft can treat differently.

    Attributes:
        ffns: The gated FFNs.
        linears: The other linear layers of the decoder's layers, by their path in the language model.
        head: What the logits are computed from, or ``None`` where that is not known.
    """

    ffns: list[GatedFFN]
    linears: dict[str, nn.Module]
    head: nn.Module | None


def find_parts(model: nn.Module) -> ModelParts:
    """Finds the parts of a model.

    Args:
        model: The model, built; its weights are not read.

    Returns:
        The parts.

    Raises:
        SiriusUnsupportedError: If the model has no gated FFN.
    """
    ffns = locate_gated_ffns(model)
    return ModelParts(ffns, _linears(language_model(model), ffns), _find_head(model, ffns[0]))


def step_bytes(model: nn.Module, head: nn.Module | None) -> int:
    """Bytes of weights that a dense decoding step of one token reads.

    Args:
        model: The model, with its weights in their plain shapes; meta tensors will do.
        head: Its lm_head.

    Returns:
        The bytes. Embeddings that are only looked up are left out, a step reads one row of them; so are encoders.
    """
    decoder = language_model(model)
    modules = [*decoder.modules(), *([] if head is None else [head])]
    read_whole: Any = None if head is None else getattr(head, "weight", None)
    looked_up = {
        id(module.weight) for module in modules if _is_lookup(module, head) and module.weight is not read_whole
    }
    num_bytes, seen = 0.0, set(looked_up)
    for module in modules:
        # A token is sent to a few of the experts.
        share = module.top_k / module.global_num_experts if isinstance(module, RoutedExperts) else 1.0
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                num_bytes += share * parameter.numel() * parameter.element_size()
    return round(num_bytes)


def _is_lookup(module: nn.Module, head: nn.Module | None) -> bool:
    if head is None and isinstance(module, ParallelLMHead):
        return False
    return module is not head and isinstance(module, (VocabParallelEmbedding, nn.Embedding))


def _linears(decoder: nn.Module, ffns: Sequence[GatedFFN]) -> dict[str, nn.Module]:
    known = {id(layer) for ffn in ffns for layer in (ffn.gate_up, ffn.down)}
    found = {}
    for path, container in _containers(decoder, ffns):
        for name, layer in container.named_modules():
            if isinstance(layer, LinearBase) and id(layer) not in known:
                known.add(id(layer))
                found[f"{path}.{name}"] = layer
    return found


def _containers(decoder: nn.Module, ffns: Sequence[GatedFFN]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost list of modules around each FFN; the module around it where there is none."""
    modules = dict(decoder.named_modules())
    seen = set()
    for ffn in ffns:
        steps = ffn.name.split(".")
        above = [".".join(steps[:end]) for end in range(1, len(steps))]
        path = next((name for name in above if isinstance(modules[name], nn.ModuleList)), ".".join(steps[:-1]))
        if path not in seen:
            seen.add(path)
            yield path, modules[path]


class _HeadFound(Exception):  # noqa: N818 - nothing went wrong
    """Carries the module out of the model's own code, before it multiplies anything."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head


def _find_head(model: Any, ffn: GatedFFN) -> nn.Module | None:
    def stop(processor: Any, given: tuple[Any, ...]) -> None:
        # Another dtype makes upstream multiply by the plain weight.
        usable = isinstance(given[0], VocabParallelEmbedding) and processor.head_dtype in (None, weight.dtype)
        raise _HeadFound(given[0] if usable else None)

    weight: Any = ffn.gate_up.weight
    if not any(isinstance(module, LogitsProcessor) for module in model.modules()):
        return None
    hooks = [m.register_forward_pre_hook(stop) for m in model.modules() if isinstance(m, LogitsProcessor)]
    try:
        with torch.no_grad():
            model.compute_logits(torch.zeros(1, ffn.hidden_size, dtype=weight.dtype, device=weight.device))
    except _HeadFound as found:
        return found.head
    finally:
        for hook in hooks:
            hook.remove()
    return None
