"""The Sirius algorithm once more, in plain PyTorch and transformers: greedy, batch 1.

This is the yardstick for the plugin, which must give the same tokens and the same acceptance
lengths with ``sparsity=coarse`` and ``refresh=false`` in fp32. It is written for reading, from the
papers' descriptions (Sirius, arXiv 2409.03856; GRIFFIN, arXiv 2404.01365), imports nothing of the
plugin and nothing of vLLM, and copies weights where that is clearer.

Positions. The token at position ``p`` is fed at ``p`` and its K/V lies in cache slot ``p``. Between
two periods the cache holds [0, P) and the last emitted token, at position P, has no K/V yet.

One period (K = kernel size):

1. draft: n <= K-1 one-token sparse steps at P, P+1, ..., P+n-1, each writing its K/V;
2. correct: crop the cache to P, then one dense pass over [last token, drafts] at P ... P+n, which
   writes the target's K/V over all of them; its logits row i judges draft i;
3. accept the longest prefix that passes, emit the target's argmax of the next row (recovered or
   bonus token), crop the cache to the accepted prefix. The emitted token is the next anchor.

It does not own: sampling, batches, the refresh of the neuron set, stop strings, penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, DynamicCache


@dataclass(frozen=True)
class CorrectionPass:
    """What one correction pass saw and decided."""

    position: int  # P, of the token emitted last before this period
    draft_token_ids: list[int]
    draft_probs: list[float]  # softmax(target logits / T) of each draft token
    argmax_token_ids: list[int]  # target argmax per row, one more than there are drafts
    num_accepted: int

    @property
    def acceptance_length(self) -> int:
        """Tokens this pass emitted: the accepted drafts and the recovered or bonus token."""
        return self.num_accepted + 1


@dataclass
class OracleResult:
    """The emitted tokens and the trace that led to them."""

    token_ids: list[int]  # without the prompt
    kept: list[Tensor]  # per FFN layer: kept neuron indices, ascending
    statistics: list[Tensor]  # per FFN layer: s, shape [intermediate]
    kv_cache: DynamicCache  # holds every position but that of the last token
    passes: list[CorrectionPass] = field(default_factory=list)

    @property
    def acceptance_lengths(self) -> list[int]:
        return [p.acceptance_length for p in self.passes]

    @property
    def num_drafted(self) -> list[int]:
        return [len(p.draft_token_ids) for p in self.passes]

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / passes that had drafts (a pass without drafts verified nothing)."""
        drafted = [p for p in self.passes if p.draft_token_ids]
        return 1 + sum(p.num_accepted for p in drafted) / max(len(drafted), 1)


def flocking_statistic(z: Tensor) -> Tensor:
    """GRIFFIN's statistic: rows to unit L2 norm, then the L2 norm of each column.

    Args:
        z: act(x W_gate) * (x W_up) of the prompt, shape [tokens, intermediate].

    Returns:
        One score per neuron, shape [intermediate], fp32.
    """
    z = z.float()
    row_norm = z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    statistic: Tensor = (z / row_norm).norm(dim=0)
    return statistic


def select_neurons(statistic: Tensor, density: float) -> Tensor:
    """Indices of the top round(density * intermediate) neurons, at least one, ascending."""
    k = max(1, round(density * statistic.numel()))
    kept: Tensor = statistic.topk(k).indices.sort().values
    return kept


def count_accepted(
    logits: Tensor,
    draft_token_ids: Sequence[int],
    *,
    threshold: float,
    threshold_temperature: float = 0.6,
    lossless: bool = False,
) -> int:
    """Length of the accepted prefix of the drafts.

    Threshold rule: accept while softmax(logits / T)[draft] >= threshold or the draft is the
    argmax. Lossless rule: accept while the draft is the argmax.

    Args:
        logits: the target's, shape [drafts + 1, vocabulary] (the last row judges nothing).
    """
    probs = (logits.float() / threshold_temperature).softmax(dim=-1)
    for i, token_id in enumerate(draft_token_ids):
        is_argmax = int(logits[i].argmax()) == token_id
        is_likely = not lossless and float(probs[i, token_id]) >= threshold
        if not (is_argmax or is_likely):
            return i
    return len(draft_token_ids)


class GatedFFN:
    """A transformers FFN: gate_proj/up_proj/down_proj, or gate_up_proj/down_proj (Phi3)."""

    def __init__(self, module: nn.Module) -> None:
        parts: Any = module
        self.module, self.act = module, getattr(parts, "act_fn", None) or parts.activation_fn
        self.b_gate: Tensor | None = None
        self.b_up: Tensor | None = None
        if hasattr(parts, "gate_up_proj"):  # rows [0, I) are the gate, [I, 2I) are up
            fused = parts.gate_up_proj
            self.w_gate, self.w_up = fused.weight.chunk(2, dim=0)
            if fused.bias is not None:
                self.b_gate, self.b_up = fused.bias.chunk(2)
        else:
            self.w_gate, self.b_gate = parts.gate_proj.weight, parts.gate_proj.bias
            self.w_up, self.b_up = parts.up_proj.weight, parts.up_proj.bias
        self.w_down, self.b_down = parts.down_proj.weight, parts.down_proj.bias
        self.original: Callable[[Tensor], Tensor] = module.forward
        self.statistic = torch.empty(0)
        self.kept = torch.empty(0, dtype=torch.long)
        self.reduced_weights: Any = None  # five tensors once ``select`` was called

    def observe(self, x: Tensor) -> Tensor:
        """Dense forward of the prompt, x of shape [1, tokens, hidden]; stores the statistic."""
        z = self.act(linear(x, self.w_gate, self.b_gate)) * linear(x, self.w_up, self.b_up)
        out = self.original(x)
        error = (linear(z, self.w_down, self.b_down) - out).norm()
        if error > 0.02 * out.norm():  # far above rounding, in bf16 too
            raise ValueError(f"{type(self.module).__name__} is not down(act(gate(x)) * up(x))")
        self.statistic = flocking_statistic(z[0])
        return out

    def select(self, density: float) -> None:
        """Fix the kept neurons: copy rows of gate and up, columns of down."""
        self.kept = kept = select_neurons(self.statistic, density)
        self.reduced_weights = (
            self.w_gate.index_select(0, kept),
            None if self.b_gate is None else self.b_gate.index_select(0, kept),
            self.w_up.index_select(0, kept),
            None if self.b_up is None else self.b_up.index_select(0, kept),
            self.w_down.index_select(1, kept),
        )

    def reduced(self, x: Tensor) -> Tensor:
        """Sparse forward: the kept neurons only."""
        w_gate, b_gate, w_up, b_up, w_down = self.reduced_weights
        z = self.act(linear(x, w_gate, b_gate)) * linear(x, w_up, b_up)
        return linear(z, w_down, self.b_down)


def find_ffns(model: nn.Module) -> list[GatedFFN]:
    """The gated FFNs of a transformers causal LM, in layer order."""
    names = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
    ffns = []
    for module in model.modules():
        children = dict(module.named_children())
        if any(all(isinstance(children.get(n), nn.Linear) for n in group) for group in names):
            ffns.append(GatedFFN(module))
    config: Any = model.config
    num_layers = config.get_text_config().num_hidden_layers
    if len(ffns) != num_layers:
        raise ValueError(f"found {len(ffns)} gated FFNs in a model of {num_layers} layers")
    return ffns


@contextmanager
def swapped_forward(ffns: Sequence[GatedFFN], name: str) -> Iterator[None]:
    """Run the FFNs through ``GatedFFN.observe`` or ``GatedFFN.reduced`` inside the block."""
    for ffn in ffns:
        ffn.module.forward = getattr(ffn, name)
    try:
        yield
    finally:
        for ffn in ffns:
            del ffn.module.forward  # the class's own forward shows again


class Oracle:
    """Target, draft and their one K/V cache. ``generate`` is the algorithm, the rest its passes."""

    def __init__(self, model: nn.Module, density: float = 0.5) -> None:
        self.model, self.density = model, density
        self.ffns = find_ffns(model)
        self.cache = DynamicCache()

    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Feed tokens behind the cache; returns logits of shape [tokens, vocabulary]."""
        out = self.model(input_ids=torch.tensor([list(token_ids)]), past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[0]
        return logits

    def crop(self, length: int) -> None:
        """Keep the K/V of positions [0, length)."""
        surplus = self.cache.get_seq_length() - length
        assert surplus >= 0, "cannot crop to a length that was never written"
        if surplus:
            self.cache.crop(-surplus)

    def prefill(self, prompt_token_ids: Sequence[int]) -> int:
        """Dense pass over the prompt, which fixes the neuron sets; returns token 0."""
        # Without a config every layer of the cache keeps all positions, windowed attention too
        # (the mask does the windowing), so any position can be rolled back.
        self.cache = DynamicCache()
        with swapped_forward(self.ffns, "observe"):
            logits = self.forward(prompt_token_ids)
        for ffn in self.ffns:
            ffn.select(self.density)
        return int(logits[-1].argmax())

    def draft(self, last: int, num_tokens: int, end_ids: Collection[int]) -> list[int]:
        """At most num_tokens greedy sparse steps after ``last``; never proposes an end token."""
        drafts: list[int] = []
        with swapped_forward(self.ffns, "reduced"):
            for _ in range(num_tokens):
                token_id = int(self.forward([drafts[-1] if drafts else last])[-1].argmax())
                if token_id in end_ids:
                    break
                drafts.append(token_id)
        return drafts

    def correct(self, position: int, last: int, drafts: Sequence[int]) -> Tensor:
        """Roll back to ``position`` and rewrite; logits of shape [drafts + 1, vocabulary]."""
        self.crop(position)
        return self.forward([last, *drafts])

    @torch.inference_mode()
    def generate(
        self,
        prompt_token_ids: Sequence[int],
        *,
        kernel_size: int = 16,
        max_tokens: int = 64,
        acceptance: str = "threshold",
        threshold: float = 0.1,
        threshold_temperature: float = 0.6,
        end_ids: Collection[int] = (),
        ignore_eos: bool = False,
        max_model_len: int | None = None,
    ) -> OracleResult:
        """Greedy Sirius generation.

        Args:
            acceptance: ``threshold`` or ``lossless``.
            end_ids: tokens that end the text when the target emits them (kept as the last token).
            ignore_eos: treat end tokens as any other token, in the draft too.
            max_model_len: most positions of prompt and output together.
        """
        if acceptance not in ("threshold", "lossless"):
            raise ValueError(f"acceptance must be threshold or lossless, not {acceptance!r}")
        if kernel_size < 1 or max_tokens < 1 or not prompt_token_ids:
            raise ValueError("kernel_size, max_tokens and the prompt length must be at least 1")
        prompt_len = len(prompt_token_ids)
        if max_model_len is not None:
            if prompt_len >= max_model_len:
                raise ValueError(f"a prompt of {prompt_len} tokens leaves no room to generate")
            max_tokens = min(max_tokens, max_model_len - prompt_len)
        end_ids = frozenset() if ignore_eos else frozenset(end_ids)

        token_ids = [self.prefill(prompt_token_ids)]
        kept, statistics = [f.kept for f in self.ffns], [f.statistic for f in self.ffns]
        result = OracleResult(token_ids, kept, statistics, self.cache)
        while len(token_ids) < max_tokens and token_ids[-1] not in end_ids:
            position, last = prompt_len + len(token_ids) - 1, token_ids[-1]
            remaining = max_tokens - len(token_ids)
            # A pass emits up to n + 1 tokens, so n <= remaining - 1; the last position fed is
            # then at most prompt_len + max_tokens - 2, which respects max_model_len as well.
            drafts = self.draft(last, min(kernel_size - 1, remaining - 1), end_ids)
            logits = self.correct(position, last, drafts)
            num_accepted = count_accepted(
                logits,
                drafts,
                threshold=threshold,
                threshold_temperature=threshold_temperature,
                lossless=acceptance == "lossless",
            )
            self.crop(position + 1 + num_accepted)
            argmax_ids = logits.argmax(dim=-1).tolist()
            token_ids += [*drafts[:num_accepted], argmax_ids[num_accepted]]
            probs = (logits.float() / threshold_temperature).softmax(dim=-1)
            draft_probs = [float(probs[i, t]) for i, t in enumerate(drafts)]
            result.passes.append(CorrectionPass(position, drafts, draft_probs, argmax_ids, num_accepted))
        return result


def load_oracle(path: str, *, density: float = 0.5, dtype: torch.dtype = torch.float32) -> Oracle:
    """An oracle on a local model folder, eager attention."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return Oracle(model.eval(), density)
