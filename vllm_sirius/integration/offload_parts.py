"""Which weights of a target can be on a disk: found by structure, before they are loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_sirius.errors import SiriusUnsupportedError
from vllm_sirius.integration.draft_plan import DraftPlan
from vllm_sirius.integration.weight_readers import PackedReader, ShowsWeight
from vllm_sirius.offload.plan import WeightSizes
from vllm_sirius.offload.weight_file import padded
from vllm_sirius.weights.panels import OUTPUTS, panels_shape

HEAD = "lm_head"


@dataclass(frozen=True)
class HeadPiece:
    """Some outputs of the lm_head, which is as large as several layers.

    Attributes:
        name: Its name in the file.
        start: Its first output.
        end: The one behind its last.
    """

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class OffloadParts:
    """Weights that are streamed or looked up.

    Attributes:
        groups: Linear layers by name, in the groups that a pass reads them in: one for each of the decoder's layers.
        head: The lm_head, or ``None`` if it is not streamed.
        pieces: Its pieces, each no larger than the largest group.
        embedding: The embedding's weight, or ``None`` if its rows are not looked up.
        embedding_name: Its name.
        lookup: The module that looks them up, if no other one has that weight.
        in_panels: Names of the weights that are stored as panels and in no other form.
    """

    groups: list[dict[str, Any]]
    head: Any
    pieces: list[HeadPiece]
    embedding: Any
    embedding_name: str
    lookup: Any
    in_panels: frozenset[str]

    @property
    def own_head(self) -> bool:
        """Whether nothing but the logits needs the weight of the streamed head."""
        return bool(self.pieces) and isinstance(self.head.quant_method, ShowsWeight)

    def sizes(self, model: nn.Module, copies: int) -> WeightSizes:
        """What the weights take.

        Args:
            model: The model, with plain weights.
            copies: Bytes of the draft's copies.
        """
        groups = tuple(sum(padded(panel_bytes(layer)) for layer in group.values()) for group in self.groups)
        head = tuple(padded(self.piece_bytes(piece)) for piece in self.pieces)
        kept = sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in model.named_parameters()
            if name not in self.in_panels and parameter is not self.embedding
        )
        rows = 0 if self.embedding is None else self.embedding.numel() * self.embedding.element_size()
        return WeightSizes(copies, kept, rows, groups, head)

    def piece_bytes(self, piece: HeadPiece) -> int:
        """Bytes of a piece of the head.

        Args:
            piece: The piece.
        """
        return _bytes_of(panels_shape(piece.end - piece.start, self.head.weight.shape[1]))


def find_parts_to_offload(model: nn.Module, plan: DraftPlan, reader: PackedReader) -> OffloadParts:
    """Finds them.

    Args:
        model: The model, with plain weights.
        plan: What drafts copy: nothing that a draft reads as the target does may be on the disk.
        reader: Has been told which layers Sirius packs.

    Returns:
        The parts.

    Raises:
        SiriusUnsupportedError: If no layer can be streamed.
    """
    groups = _groups(model, plan, reader)
    if not groups:
        raise SiriusUnsupportedError(
            "offload='disk': no layer of this model can be streamed, because drafts read all of them as the target does: use "
            "offload='none'."
        )
    head = plan.head.module if plan.head is not None and _is_embedding(plan.head.module) else None
    pieces = [] if head is None else _pieces(head, max(sum(map(panel_bytes, group.values())) for group in groups))
    name, embedding = _embedding(model)
    weights = [layer.weight for group in groups for layer in group.values()]
    if head is not None and isinstance(head.quant_method, ShowsWeight):
        weights.append(head.weight)
    wanted = set(map(id, weights))
    in_panels = frozenset(name for name, parameter in model.named_parameters() if id(parameter) in wanted)
    lookups = [module for module in model.modules() if getattr(module, "weight", None) is embedding]
    lookup = lookups[0] if embedding is not None and len(lookups) == 1 and lookups[0] is not head else None
    return OffloadParts(groups, head, pieces, embedding, name, lookup, in_panels)


def panel_bytes(layer: Any) -> int:
    """Bytes of a layer's panels.

    Args:
        layer: The layer, with its plain weight.
    """
    return _bytes_of(panels_shape(*layer.weight.shape))


def _bytes_of(shape: tuple[int, int, int, int]) -> int:
    panels, pairs, outputs, two = shape
    return panels * pairs * outputs * two * torch.bfloat16.itemsize


def _groups(model: nn.Module, plan: DraftPlan, reader: PackedReader) -> list[dict[str, Any]]:
    copied = {id(layer) for ffn in plan.ffns for layer in (ffn.gate_up, ffn.down)}
    copied |= {id(linear.module) for linear in plan.linears}
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    groups: dict[str, dict[str, Any]] = {}
    module: Any
    for name, module in model.named_modules():
        if id(module) not in copied or not reader.wants_panels(module):
            continue
        if uses[id(module.weight)] == 1 and not getattr(module, "_cpu_skip_gemm_dispatch", False):
            found = re.match(r".*?\.\d+(?=\.)", name)
            groups.setdefault(found[0] if found else name, {})[name] = module
    return list(groups.values())


def _pieces(head: Any, most_bytes: int) -> list[HeadPiece]:
    """As few pieces as are no larger than that, of about the same size."""
    num_outputs, width = head.weight.shape
    num_panels = -(-num_outputs // OUTPUTS)
    most_panels = max(1, most_bytes // _bytes_of(panels_shape(OUTPUTS, width)))
    count = -(-num_panels // most_panels)
    ends = [min(num_outputs, OUTPUTS * (num_panels * (i + 1) // count)) for i in range(count)]
    starts = [0, *ends[:-1]]
    return [HeadPiece(f"{HEAD}.{i}", start, end) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]


def _embedding(model: nn.Module) -> tuple[str, Any]:
    """The first embedding of the vocabulary that is looked up, if it is whole and plain."""
    for name, module in model.named_modules():
        if _is_embedding(module) and not isinstance(module, ParallelLMHead):
            weight: Any = module.weight
            return f"{name}.weight", weight
    return "", None


def _is_embedding(module: Any) -> bool:
    return (
        isinstance(module, VocabParallelEmbedding)
        and isinstance(module.quant_method, UnquantizedEmbeddingMethod)
        and module.tp_size == 1
    )


def others(model: nn.Module, parts: OffloadParts) -> Iterator[tuple[str, torch.Tensor]]:
    """What else a checkpoint holds: all but the weights that are stored as panels alone.

    Args:
        model: The model.
        parts: What is stored as panels.
    """
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Modules may share one, which has several names then.
        if name not in parts.in_panels and id(tensor) not in seen:
            seen.add(id(tensor))
            yield f"model.{name}", tensor.detach()
