"""How much of a model the draft can leave out. Reads modules of ``vllm.model_executor.layers``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from vllm_sirius.config import SiriusConfig
from vllm_sirius.ffn.locate import GatedFFN
from vllm_sirius.metrics import draft_density, fine_ffn_density


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide what Sirius can gain, of one tensor-parallel rank.

    Attributes:
        num_ffns: Gated FFNs.
        num_neurons: Neurons of the first of them.
        step_bytes: Weight bytes a dense decoding step reads.
        ffn_bytes: Part of them that belongs to gated FFNs.
    """

    num_ffns: int
    num_neurons: int
    step_bytes: int
    ffn_bytes: int

    @property
    def ffn_share(self) -> float:
        """Part of a dense step's bytes that belongs to gated FFNs."""
        return self.ffn_bytes / self.step_bytes

    def draft_density(self, config: SiriusConfig) -> float:
        """Part of a dense step's bytes that a draft step has to read."""
        config = as_on_this_platform(config)
        kept = {"coarse": config.density, "fine": fine_ffn_density(config.density), "none": 1.0}[config.sparsity]
        return draft_density(self.ffn_share, kept, *bytes_per_weight(config))


LOW_BIT_SHARE = {"shared": 1.0, "int8": 0.5, "int4": 0.28125}
"""Bytes of a copied weight, scales included, over those of a 16-bit one."""


def as_on_this_platform(config: SiriusConfig) -> SiriusConfig:
    """The knobs with ``auto`` decided as a model is served on this platform with kernels.

    Args:
        config: The knobs.
    """
    return config.resolved(copies=current_platform.is_cpu())


def bytes_per_weight(config: SiriusConfig) -> tuple[float, float]:
    """Bytes of a weight that a draft reads over those of the target's: of the FFNs, and of all other layers.

    Args:
        config: The knobs; ``auto`` is taken as on this platform with kernels.
    """
    copied = LOW_BIT_SHARE[as_on_this_platform(config).draft_weights]
    return copied, copied if config.draft_weights_scope == "all" else 1.0


def measure_shape(model: nn.Module, ffns: Sequence[GatedFFN]) -> ModelShape:
    """Measures a model whose weights still have their plain shapes (built, not yet packed; meta tensors will do).

    Args:
        model: The model.
        ffns: Its gated FFNs.

    Returns:
        The sizes. A token embedding of its own is left out: a step reads one row of it per token.
    """
    step_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    for module in model.modules():
        # The same module serves as embedding and head where the two are tied, and the head is read as a whole.
        if type(module) is VocabParallelEmbedding and heads and not any(h.weight is module.weight for h in heads):
            step_bytes -= sum(p.numel() * p.element_size() for p in module.parameters())
    weight: Any = ffns[0].gate_up.weight
    ffn_bytes = sum(ffn.num_parameters for ffn in ffns) * int(weight.element_size())
    return ModelShape(len(ffns), ffns[0].num_neurons, step_bytes, ffn_bytes)
