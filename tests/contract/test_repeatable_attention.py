"""Attention of vLLM's CPU build gives a token the same result whatever it shares a pass with, once Sirius builds its metadata."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder, _get_attn_isa

from vllm_sirius.config import SiriusConfig
from vllm_sirius.integration.runner_v1.attention import (
    MOST_QUERIES,
    RepeatableAttentionBuilder,
    in_pieces,
    is_repeatable,
)

BLOCK = 32
LENGTH = 4096


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Layer:
    """One attention layer on pages of its own, for requests whose texts all lie on the same blocks.

    Args:
        heads: Query heads, key heads and their width.
        builder: Class of the metadata builder.
    """

    def __init__(self, heads: tuple[int, int, int], builder: type[CPUAttentionMetadataBuilder]) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        num_blocks = LENGTH // BLOCK
        self.pages = torch.randn(num_blocks + 1, self.num_kv_heads, BLOCK, 2 * self.head_dim).bfloat16()
        self.blocks = 1 + torch.randperm(num_blocks, dtype=torch.int32)
        self.impl = object.__new__(CPUAttentionBackendImpl)
        vars(self.impl).update(
            attn_type="decoder",
            alibi_slopes=None,
            sliding_window=-1,
            logits_soft_cap=0,
            sinks=None,
            kv_cache_dtype="auto",
        )
        self.impl.scale = self.head_dim**-0.5
        self.builder = object.__new__(builder)
        vars(self.builder).update(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=torch.bfloat16,
            window_size=-1,
            block_size=BLOCK,
            kv_cache_dtype="auto",
            isa=_get_attn_isa(torch.bfloat16, BLOCK, self.head_dim, "auto"),
            is_cross_attention=False,
            is_encoder_only_attention=False,
        )

    def run(self, queries: torch.Tensor, counts: list[int], ends: list[int]) -> torch.Tensor:
        """Attention of requests with so many queries each, whose texts end there."""
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        common = SimpleNamespace(
            num_reqs=len(counts),
            num_actual_tokens=len(queries),
            max_query_len=max(counts),
            max_seq_len=max(ends),
            query_start_loc=starts,
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            block_table_tensor=self.blocks.expand(len(counts), -1).contiguous(),
            slot_mapping=torch.zeros(len(queries), dtype=torch.int64),
            causal=True,
        )
        layer = SimpleNamespace(isa=self.builder.isa, _k_scale_float=1.0, _v_scale_float=1.0)
        output = torch.empty_like(queries)
        self.impl.forward(layer, queries, queries, queries, self.pages, self.builder.build(0, common), output)
        return output


HEADS = [(9, 3, 64), (12, 2, 128), (8, 8, 32)]


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="not promised for attention on AMX tiles")
@pytest.mark.parametrize("heads", HEADS)
def test_a_query_does_not_depend_on_its_company(heads):
    layer = Layer(heads, RepeatableAttentionBuilder)
    end = random.randint(3000, LENGTH)
    queries = 3 * torch.randn(100, *heads[::2]).bfloat16()
    alone = torch.cat([layer.run(queries[i : i + 1], [1], [end - 99 + i]) for i in range(100)])
    for count in (2, 3, 7, 8, 9, 16, 17, 64, 100):
        assert torch.equal(layer.run(queries[-count:], [count], [end]), alone[-count:])
    # Neighbours of other lengths, in whatever order.
    counts = [100, 1, 16, 40]
    random.shuffle(counts)
    company = torch.cat([queries[-count:] for count in counts])
    together = layer.run(company, counts, [end] * 4).split(counts)
    assert all(torch.equal(part, alone[-len(part) :]) for part in together)


@pytest.mark.parametrize("heads", HEADS)
def test_pieces_compute_what_whole_requests_compute(heads):
    ours, upstream = Layer(heads, RepeatableAttentionBuilder), Layer(heads, CPUAttentionMetadataBuilder)
    upstream.pages, upstream.blocks = ours.pages, ours.blocks
    queries = torch.randn(61, *heads[::2]).bfloat16()
    arguments = queries, [9, 1, 51], [900, 17, 51]
    torch.testing.assert_close(ours.run(*arguments), upstream.run(*arguments), atol=2e-2, rtol=2e-2)


def test_every_query_is_in_one_piece_that_ends_with_it():
    counts = [random.choice((1, 2, 7, 8, 9, 16, 17, 33)) for _ in range(20)]
    ends = [count + random.randint(0, 50) for count in counts]
    common = SimpleNamespace(
        num_reqs=20,
        max_query_len=max(counts),
        query_start_loc=torch.tensor([0, *counts]).cumsum(0).int(),
        seq_lens=torch.tensor(ends, dtype=torch.int32),
        block_table_tensor=torch.arange(20, dtype=torch.int32).unsqueeze(1),
    )
    split = in_pieces(common, MOST_QUERIES)
    found = []
    starts = split.query_start_loc.tolist()
    for piece in range(split.num_reqs):
        length = starts[piece + 1] - starts[piece]
        assert 0 < length <= MOST_QUERIES
        owner, end = int(split.block_table_tensor[piece, 0]), int(split.seq_lens[piece])
        found += [(owner, position) for position in range(end - length, end)]
    assert found == [(row, at) for row in range(20) for at in range(ends[row] - counts[row], ends[row])]
    common.max_query_len = MOST_QUERIES
    assert in_pieces(common, MOST_QUERIES) is common


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_kernels": "sirius"}, True),
        ({"target_kernels": "vllm"}, False),
        ({"target_kernels": "sirius", "acceptance": "threshold"}, False),
    ],
)
def test_attention_is_changed_only_where_answers_are_repeatable(monkeypatch, options, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert is_repeatable(SiriusConfig(**options)) == expected
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not is_repeatable(SiriusConfig(**options))


def test_long_texts_are_left_to_upstream(monkeypatch):
    layer = Layer((8, 8, 32), RepeatableAttentionBuilder)
    monkeypatch.setattr("vllm_sirius.integration.runner_v1.attention.LONGEST_TEXT", 64)
    queries = torch.randn(20, 8, 32).bfloat16()
    built = []
    monkeypatch.setattr(layer.impl, "forward", lambda *arguments: built.append(arguments[5]))
    layer.run(queries, [20], [64])
    layer.run(queries, [20], [65])
    assert [len(metadata.seq_lens) for metadata in built] == [3, 1]
