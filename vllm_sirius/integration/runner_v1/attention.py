"""Attention that gives a token the same result whatever it shares a pass with. Subclasses ``CPUAttentionMetadataBuilder``.

vLLM's CPU kernel sums over the keys of a text in stretches, and how long these are depends on how many queries of a request
come together and on how work is divided among threads. Rounding then differs between a token that is decoded alone, verified
with fifteen drafts, or computed with a prompt. Two things make it one and the same sum: queries are shown to the kernel at
most `MOST_QUERIES` at a time, and keys are not divided among threads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.logger import init_logger
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from vllm_sirius.config import SiriusConfig

logger = init_logger("vllm.sirius")

MOST_QUERIES = 8
"""Up to so many queries of a request, the kernel's stretches of keys are as long as for one."""

SPLIT_KEYS = "VLLM_CPU_ATTN_SPLIT_KV"
"""vLLM's own switch, on unless it is set: whether threads may share the keys of one query."""

LONGEST_TEXT = 8192
"""Tokens of the longest text of a batch up to which this is done: beyond, reading keys again for each piece costs too much."""


class RepeatableAttentionBuilder(CPUAttentionMetadataBuilder):
    """Upstream's builder, whose metadata describes each request as several short ones on the same blocks."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As upstream. Attention that is not causal and long texts are left as they are."""
        if (
            common_attn_metadata.causal is not True
            or common_attn_metadata.max_seq_len > LONGEST_TEXT
            or self.is_cross_attention
            or self.is_encoder_only_attention
        ):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = super().build(common_prefix_len, in_pieces(common_attn_metadata, MOST_QUERIES), fast_build)
        if envs.VLLM_CPU_ATTN_SPLIT_KV and not envs.is_set(SPLIT_KEYS):
            metadata.scheduler_metadata = self._schedule_whole_texts(metadata)
        return metadata

    def _schedule_whole_texts(self, metadata: Any) -> torch.Tensor:
        schedule: torch.Tensor = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(metadata.seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=metadata.seq_lens,
            dtype=self.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=True,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=False,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return schedule


def in_pieces(common: Any, most_queries: int) -> Any:
    """Describes a batch in which no request has more than so many queries: longer ones become several.

    A piece is a request whose text ends with its last query: causal attention sees exactly what it would have seen.

    Args:
        common: Upstream's metadata of a causal batch.
        most_queries: Most queries of a piece.

    Returns:
        `common` itself where nothing is too long, otherwise a copy.
    """
    if common.max_query_len <= most_queries:
        return common
    starts = common.query_start_loc.long()
    counts = starts[1:] - starts[:-1]
    pieces = (counts + most_queries - 1).div(most_queries, rounding_mode="floor")
    owner = torch.arange(len(counts)).repeat_interleave(pieces)
    place = torch.arange(len(owner)) - (pieces.cumsum(0) - pieces)[owner]
    ends = torch.minimum((place + 1) * most_queries, counts[owner])
    split = copy.copy(common)
    split.num_reqs = len(owner)
    split.max_query_len = most_queries
    split.query_start_loc = torch.cat([starts[:1], starts[owner] + ends]).to(torch.int32)
    split.query_start_loc_cpu = split.query_start_loc
    split.seq_lens = (common.seq_lens.long()[owner] - counts[owner] + ends).to(torch.int32)
    split.block_table_tensor = common.block_table_tensor[owner]
    return split


def is_repeatable(config: SiriusConfig) -> bool:
    """Whether everything else of a pass is repeatable, so that attention should be.

    Args:
        config: The options, with ``target_kernels`` decided: vLLM's own kernels round one token otherwise than several.
    """
    return config.lossless and config.target_kernels == "sirius" and not torch.cpu._is_amx_tile_supported()


def make_repeatable(attention_groups: Iterable[Iterable[Any]]) -> None:
    """Gives a runner's freshly made metadata builders their repeatable form, and says where that is not possible.

    Args:
        attention_groups: Upstream's groups of attention layers, by KV cache group.
    """
    others = set()
    for group in (group for groups in attention_groups for group in groups):
        for builder in group.metadata_builders:
            if type(builder) is CPUAttentionMetadataBuilder:
                builder.__class__ = RepeatableAttentionBuilder
            elif type(builder) is not RepeatableAttentionBuilder:
                others.add(type(builder).__name__)
    if others:
        logger.info("Sirius: answers may depend on what else runs: attention is built by %s", ", ".join(sorted(others)))
    if envs.is_set(SPLIT_KEYS) and envs.VLLM_CPU_ATTN_SPLIT_KV:
        logger.info("Sirius: answers may depend on what else runs: %s=1 lets threads share a text", SPLIT_KEYS)
