"""What describes a tiny model, the sizes most have, and the tensors of checkpoints that transformers cannot write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VOCAB_SIZE = 320
"""256 byte tokens, the special ones and fillers; a multiple of 64, to which vLLM pads."""
MAX_LEN = 512
HIDDEN = 64

Tensors = dict[str, "torch.Tensor"]

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_LEN,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class TinyModel:
    """One entry of the catalogue.

    Attributes:
        name: Key in `tiny_catalogue.TINY_MODELS` and first part of the folder's name.
        config: Name of a transformers config class.
        options: Arguments of that class, laid over the common sizes.
        architecture: Name that vLLM resolves; empty keeps the one transformers writes.
        model: Name of a transformers model class; `AutoModelForCausalLM` picks it if empty.
        common: Whether the common sizes apply; old configs spell them differently.
        extra: Keys added to config.json, for classes that transformers does not know.
        rename: Rewrites the saved tensors, for the same classes.
        mlp: vLLM class of one FFN module, "" where the model has no gated FFN.
        children: Names of its gate-and-up, activation and down modules.
        act: Class of the activation module.
        layers: Number of gated FFN modules.
        backend: "native", or "transformers" where vLLM runs the transformers code.
        refusal: Why the plugin must refuse the model, "" if it must not.
    """

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    architecture: str = ""
    model: str = ""
    common: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    rename: Callable[[Tensors], Tensors] | None = None
    mlp: str = ""
    children: tuple[str, str, str] = ("gate_up_proj", "act_fn", "down_proj")
    act: str = "SiluAndMul"
    layers: int = 3
    backend: str = "native"
    refusal: str = ""


def internlm2_names(tensors: Tensors) -> Tensors:
    """Llama tensors under the names of InternLM2, its q, k and v packed per key/value head."""
    import torch

    groups, dim = SIZES["num_key_value_heads"], SIZES["head_dim"]
    swaps = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            parts = [tensors[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            heads = [part.view(groups, -1, dim, part.shape[-1]) for part in parts]
            packed = torch.cat(heads, dim=1).reshape(-1, tensor.shape[-1])
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = packed
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            out[_swap(name, swaps)] = tensor
    return out


def exaone_names(tensors: Tensors) -> Tensors:
    """Llama tensors under the names of EXAONE 3."""
    swaps = {
        "model.layers": "transformer.h",
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    }
    return {_swap(name, swaps): tensor for name, tensor in tensors.items()}


def _swap(name: str, swaps: dict[str, str]) -> str:
    for old, new in swaps.items():
        name = name.replace(old, new)
    return name
