"""Hand-checkable properties of the oracle, on tiny random models (nothing is downloaded)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

from .oracle import (
    Oracle,
    count_accepted,
    find_ffns,
    flocking_statistic,
    select_neurons,
    swapped_forward,
)

PROMPT = [3, 17, 42, 8, 25, 61, 5, 33, 12, 50, 9]
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # large, so that the FFNs matter and logits lie far apart
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**TINY),
    "llama-mlp-bias": lambda: LlamaConfig(**TINY, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**TINY),
    "phi3": lambda: Phi3Config(**TINY),
    # Two windowed layers, one full: the text below is much longer than the window.
    "gemma3": lambda: Gemma3TextConfig(
        **TINY,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
}


def build(name: str = "llama") -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    config = CONFIGS[name]()
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # initialised to zero, which would hide slips
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: on a busy machine threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> Any:
    return build()


def plain_greedy(model: Any, max_tokens: int, end_ids: list[int] | None = None) -> list[int]:
    """transformers' own greedy search, without the prompt."""
    model.generation_config.eos_token_id = end_ids
    prompt = torch.tensor([PROMPT])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_tokens,
        do_sample=False,
    )
    tokens: list[int] = out[0, len(PROMPT) :].tolist()
    return tokens


def dense_cache(model: Any, token_ids: list[int]) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([token_ids]), past_key_values=cache, use_cache=True)
    return cache


def largest_difference(a: DynamicCache, b: DynamicCache) -> float:
    def tensors(cache: Any) -> list[torch.Tensor]:
        return [t for layer in cache.layers for t in (layer.keys, layer.values)]

    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return max(float((x - y).abs().max()) for x, y in pairs)


# -- statistic and selection ---------------------------------------------------------------------


def test_statistic_by_hand() -> None:
    z = torch.tensor([[3.0, 4.0, 0.0], [0.0, -6.0, 8.0]])  # row norms 5 and 10
    # unit rows: [.6, .8, 0] and [0, -.6, .8]; column norms: .6, sqrt(.64 + .36) = 1, .8
    torch.testing.assert_close(flocking_statistic(z), torch.tensor([0.6, 1.0, 0.8]))
    # a token of any length counts the same, a zero row counts nothing
    scaled = torch.cat([z * torch.tensor([[100.0], [0.01]]), torch.zeros(1, 3)])
    torch.testing.assert_close(flocking_statistic(scaled), torch.tensor([0.6, 1.0, 0.8]))


@pytest.mark.parametrize(
    ("density", "kept"), [(0.0, [1]), (0.34, [1]), (0.5, [1, 2]), (0.67, [1, 2]), (1.0, [0, 1, 2])]
)
def test_selection_by_hand(density: float, kept: list[int]) -> None:
    # 0.5 * 3 = 1.5 rounds to 2
    assert select_neurons(torch.tensor([0.6, 1.0, 0.8]), density).tolist() == kept


def test_statistic_uses_prompt_tokens_only(llama: Any) -> None:
    oracle = Oracle(llama, 0.5)
    short = oracle.generate(PROMPT, kernel_size=4, max_tokens=1)
    long = oracle.generate(PROMPT, kernel_size=4, max_tokens=40)
    assert short.passes == []
    assert len(long.passes) > 1
    for a, b in zip(short.kept, long.kept, strict=True):
        assert torch.equal(a, b)
        assert a.numel() == 24
    # layer 0, recomputed from its input
    seen: list[torch.Tensor] = []
    mlp = llama.model.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    dense_cache(llama, PROMPT)
    hook.remove()
    z = mlp.act_fn(mlp.gate_proj(seen[0])) * mlp.up_proj(seen[0])
    torch.testing.assert_close(flocking_statistic(z.detach()), short.statistics[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_reduced_ffn_equals_masked_dense_ffn(name: str) -> None:
    model = build(name)
    oracle = Oracle(model, 0.3)
    x = torch.randn(1, 5, 32)
    with torch.inference_mode():
        oracle.prefill(PROMPT)
        ffn = oracle.ffns[0]
        mask = torch.zeros(48).index_fill(0, ffn.kept, 1.0)
        down: Any = ffn.module.down_proj
        hook = down.register_forward_pre_hook(lambda _, args: (args[0] * mask,))
        masked = ffn.module(x)
        hook.remove()
        torch.testing.assert_close(ffn.reduced(x), masked, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(masked, ffn.module(x), rtol=1e-2, atol=1e-2)


# -- acceptance ----------------------------------------------------------------------------------


def test_acceptance_by_hand() -> None:
    # softmax(logits / 0.5) per row: [.8, .2, 0], [.5, .3, .2], [.1, .1, .8] and the bonus row
    probs = torch.tensor([[0.8, 0.2, 1e-30], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
    logits = probs.log() * 0.5

    def count(drafts: list[int], threshold: float, lossless: bool = False) -> int:
        return count_accepted(
            logits,
            drafts,
            threshold=threshold,
            threshold_temperature=0.5,
            lossless=lossless,
        )

    assert count([0, 0, 2], 0.9) == 3  # every draft is the argmax, whatever the threshold
    assert count([1, 1, 2], 0.19) == 3
    assert count([1, 1, 2], 0.25) == 0  # .2 fails first
    assert count([0, 2, 2], 0.25) == 1  # stops at the first failure, though the third would pass
    assert count([2, 2, 1], 0.0) == 3
    assert count([2, 2, 1], -1.0) == 3
    assert count([0, 1, 2], 0.0, lossless=True) == 1
    assert count([], 0.1) == 0


def test_lower_threshold_accepts_no_less_on_a_fixed_trace() -> None:
    generator = torch.Generator().manual_seed(0)
    thresholds = [1.5, 0.9, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01, 0.0]
    seen: set[int] = set()
    for _ in range(50):
        logits = torch.randn(16, 12, generator=generator) * 2
        drafts = logits[:15].topk(2).indices  # first or second choice
        choice = torch.randint(2, (15, 1), generator=generator)
        tokens = drafts.gather(1, choice)[:, 0].tolist()
        counts = [count_accepted(logits, tokens, threshold=t) for t in thresholds]
        assert counts == sorted(counts)
        assert counts[0] == count_accepted(logits, tokens, threshold=0, lossless=True)
        assert counts[-1] == 15
        seen.update(counts)
    assert len(seen) > 8  # the trace is not trivial


# -- the whole algorithm -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_full_density_accepts_everything(name: str) -> None:
    model = build(name)
    result = Oracle(model, 1.0).generate(PROMPT, kernel_size=8, max_tokens=41)
    assert result.token_ids == plain_greedy(model, 41)
    assert result.num_drafted == [7] * 5
    assert result.acceptance_lengths == [8] * 5


@pytest.mark.parametrize("kernel_size", [1, 2, 5, 16])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.9])
def test_lossless_is_plain_greedy(llama: Any, density: float, kernel_size: int) -> None:
    result = Oracle(llama, density).generate(PROMPT, kernel_size=kernel_size, max_tokens=40, acceptance="lossless")
    assert result.token_ids == plain_greedy(llama, 40)
    assert 1 + sum(result.acceptance_lengths) == 40
    if kernel_size > 1:  # some drafts must have been rejected, or nothing was shown
        assert sum(result.num_drafted) + 1 + len(result.passes) > 40


@pytest.mark.parametrize("name", CONFIGS)
def test_lossless_is_plain_greedy_on_every_family(name: str) -> None:
    model = build(name)
    result = Oracle(model, 0.6).generate(PROMPT, kernel_size=6, max_tokens=40, acceptance="lossless")
    assert result.token_ids == plain_greedy(model, 40)
    assert min(result.acceptance_lengths) < 6


@pytest.mark.parametrize("threshold", [0.0, -0.5])
@pytest.mark.parametrize("kernel_size", [2, 7, 16])
def test_zero_threshold_accepts_everything(llama: Any, kernel_size: int, threshold: float) -> None:
    result = Oracle(llama, 0.3).generate(
        PROMPT,
        kernel_size=kernel_size,
        max_tokens=1 + 3 * kernel_size,
        threshold=threshold,
        end_ids=[2],
        ignore_eos=True,
    )
    assert result.acceptance_lengths == [kernel_size] * 3
    assert result.acceptance_length == kernel_size
    assert len(result.token_ids) == 1 + 3 * kernel_size
    assert result.token_ids != plain_greedy(llama, 1 + 3 * kernel_size)  # lossy


def test_emitted_tokens_follow_from_the_trace(llama: Any) -> None:
    result = Oracle(llama, 0.6).generate(PROMPT, kernel_size=6, max_tokens=50, threshold=0.1)
    tokens = result.token_ids[:1]
    for p in result.passes:
        assert p.position == len(PROMPT) + len(tokens) - 1
        passed = [
            prob >= 0.1 or draft == best
            for draft, prob, best in zip(p.draft_token_ids, p.draft_probs, p.argmax_token_ids, strict=False)
        ]
        assert passed[: p.num_accepted + 1] in (
            [True] * p.num_accepted + [False],
            [True] * len(p.draft_token_ids),
        )
        tokens += [*p.draft_token_ids[: p.num_accepted], p.argmax_token_ids[p.num_accepted]]
    assert tokens == result.token_ids
    assert len({*result.acceptance_lengths}) > 2  # neither all nor nothing


@pytest.mark.parametrize("max_tokens", range(1, 24))
def test_max_tokens_is_exact(llama: Any, max_tokens: int) -> None:
    result = Oracle(llama, 0.5).generate(PROMPT, kernel_size=6, max_tokens=max_tokens)
    assert len(result.token_ids) == max_tokens
    emitted = 1
    for drafted, length in zip(result.num_drafted, result.acceptance_lengths, strict=True):
        assert drafted == min(5, max_tokens - emitted - 1)
        emitted += length


@pytest.mark.parametrize("room", [1, 2, 5, 6, 7, 8, 30])
def test_max_model_len_bounds_prompt_and_output(llama: Any, room: int) -> None:
    result = Oracle(llama, 0.5).generate(
        PROMPT, kernel_size=6, max_tokens=100, max_model_len=len(PROMPT) + room, threshold=0
    )
    assert len(result.token_ids) == room
    fed = [p.position + len(p.draft_token_ids) for p in result.passes]
    assert max(fed, default=0) <= len(PROMPT) + room - 2
    with pytest.raises(ValueError, match="no room"):
        Oracle(llama).generate(PROMPT, max_model_len=len(PROMPT))


def test_only_the_target_ends_the_text(llama: Any) -> None:
    plain = plain_greedy(llama, 30)
    end_id = plain[17]
    expected = plain_greedy(llama, 30, [end_id])
    assert expected == plain[: plain.index(end_id) + 1]
    assert len(expected) > 1
    for density in (0.5, 1.0):  # at 1.0 the draft would propose the end token itself
        oracle = Oracle(llama, density)
        result = oracle.generate(PROMPT, kernel_size=8, max_tokens=30, acceptance="lossless", end_ids=[end_id])
        assert result.token_ids == expected
        assert all(end_id not in p.draft_token_ids for p in result.passes)
    first = plain[0]
    assert Oracle(llama).generate(PROMPT, max_tokens=30, end_ids=[first]).token_ids == [first]


# -- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_after_every_pass_equals_dense_recomputation(name: str) -> None:
    model = build(name)
    oracle = Oracle(model, 0.4)
    lengths = set()
    for max_tokens in range(1, 22):  # the run ends after one pass, two passes, ...
        result = oracle.generate(PROMPT, kernel_size=5, max_tokens=max_tokens, threshold=0.05)
        written = [*PROMPT, *result.token_ids[:-1]]
        assert result.kv_cache.get_seq_length() == len(written)
        assert largest_difference(result.kv_cache, dense_cache(model, written)) < 1e-4
        lengths.update(result.acceptance_lengths)
    assert len(lengths) > 1


def test_draft_writes_its_own_keys_and_the_correction_replaces_them(llama: Any) -> None:
    oracle = Oracle(llama, 0.3)
    with torch.inference_mode():
        last = oracle.prefill(PROMPT)
        drafts = oracle.draft(last, 5, ())
        fed = [*PROMPT, last, *drafts]
        assert oracle.cache.get_seq_length() == len(fed) - 1  # the last draft was not fed
        assert largest_difference(oracle.cache, dense_cache(llama, fed[:-1])) > 1e-2
        logits = oracle.correct(len(PROMPT), last, drafts)
        assert logits.shape == (6, 64)
        assert largest_difference(oracle.cache, dense_cache(llama, fed)) < 1e-4


# -- the hooks -----------------------------------------------------------------------------------


def test_forward_is_restored_even_after_an_error(llama: Any) -> None:
    ffns = find_ffns(llama)

    def fail_inside() -> None:
        with swapped_forward(ffns, "reduced"):
            assert all("forward" in vars(f.module) for f in ffns)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all("forward" not in vars(f.module) for f in ffns)


def test_a_model_without_gated_ffn_is_refused() -> None:
    model = build()
    for layer in model.model.layers:
        layer.mlp.gate_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="0 gated FFNs in a model of 3 layers"):
        Oracle(model)
