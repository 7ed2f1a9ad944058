"""Embeddings whose rows are looked up in a file. Subclasses upstream's methods of ``VocabParallelEmbedding``."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from vllm_sirius.target.stored_rows import StoredRows

_STORED: list[weakref.ref[StoredRows]] = []
"""Embeddings of this process that are looked up in files: compiled code knows them by their number."""


@torch.library.custom_op("vllm_sirius::stored_rows", mutates_args=())
def _stored_rows(indices: torch.Tensor, handle: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of an embedding, opaque to the compiler."""
    stored = _STORED[handle]()
    assert stored is not None, "the engine of this embedding is gone"
    return stored.rows(indices)


@_stored_rows.register_fake
def _(indices: torch.Tensor, handle: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return indices.new_empty(*indices.shape, width, dtype=dtype)


def look_up_in_file(model: nn.Module, weight: torch.Tensor, stored: StoredRows) -> None:
    """Has all modules that share an embedding look its rows up in a file, and frees its memory.

    Args:
        model: The model.
        weight: The embedding.
        stored: Its rows.
    """
    _STORED.append(weakref.ref(stored))
    handle = len(_STORED) - 1
    module: Any
    for module in model.modules():
        if getattr(module, "weight", None) is weight:
            module.quant_method = _with_stored_rows(module.quant_method, stored, handle)
            module.weight = nn.Parameter(weight.data.new_empty(0), requires_grad=False)
    weight.data = weight.data.new_empty(0)


def _with_stored_rows(method: Any, stored: StoredRows, handle: int) -> Any:
    upstream = type(method)

    def embedding(self: Any, layer: nn.Module, indices: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            found: torch.Tensor = torch.ops.vllm_sirius.stored_rows(indices, handle, stored.width, stored.dtype)
            return found
        return self.sirius_rows.rows(indices)

    kind: Any = type(f"Stored{upstream.__name__}", (upstream,), {"embedding": embedding})
    made = kind.__new__(kind)
    vars(made).update(vars(method), sirius_rows=stored)
    return made
