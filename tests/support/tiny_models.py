"""A catalogue of tiny random-weight models that real vLLM loads on CPU.

Owns: the configs, their seeded weights, the tokenizer and the folder that `vllm serve` or
`LLM(model=...)` reads. Everything is made locally, no network and no hub cache. Does not own
any engine: the tests start vLLM themselves.

Three lists split the catalogue. `GATED` holds decoders whose FFN is gated (SwiGLU or GeGLU), in
every spelling of the child modules that vLLM uses; the plugin must serve them. `REFUSED` holds
models that it must refuse, each with the reason in `TinyModel.refusal`. `MIXED` holds the cases
between the two, whose treatment is the plugin's decision: sparse experts in some layers and a
dense gated FFN in others, and an activation that prunes neurons by itself.

Three checkpoints have no config class in transformers (InternLM2, EXAONE 3, MiniCPM). They are
written from a Llama with the names changed, and vLLM picks its own class from `architectures`.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import transformers

__all__ = ["FIRST_CHARACTER", "GATED", "MIXED", "REFUSED", "TINY_MODELS", "TinyModel", "build"]

VOCAB_SIZE = 320
"""256 byte tokens, the special ones and fillers; a multiple of 64, to which vLLM pads."""
PAD_ID, BOS_ID, EOS_ID = 256, 257, 258
FIRST_CHARACTER = ord("!")
"""Character of token 0; those of ASCII follow."""
MAX_LEN = 512
_HIDDEN = 64
_SEED = 1
"""Chosen so that no model falls into a loop of a few tokens."""
_NEURON_SPREAD = 0.5
"""Standard deviation of the logarithm of a neuron's size."""
_STAMP = zlib.crc32(Path(__file__).read_bytes())
"""Part of each folder's name, so that an edited catalogue never finds an old model."""

_FINAL_NORMS = (
    "model.norm.weight",
    "model.embedding_norm.weight",
    "model.decoder.final_layer_norm.weight",
    "transformer.ln_f.weight",
)

_Tensors = dict[str, "torch.Tensor"]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": _HIDDEN,
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
        name: Key in `TINY_MODELS` and first part of the folder's name.
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
    rename: Callable[[_Tensors], _Tensors] | None = None
    mlp: str = ""
    children: tuple[str, str, str] = ("gate_up_proj", "act_fn", "down_proj")
    act: str = "SiluAndMul"
    layers: int = 3
    backend: str = "native"
    refusal: str = ""


def _internlm2_names(tensors: _Tensors) -> _Tensors:
    """Llama tensors under the names of InternLM2, its q, k and v packed per key/value head."""
    import torch

    groups, dim = _SIZES["num_key_value_heads"], _SIZES["head_dim"]
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


def _exaone_names(tensors: _Tensors) -> _Tensors:
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


_SQUARE = {"hidden_size": 128}
"""For classes that know no `head_dim` and divide hidden_size by the number of heads."""
_ALTERNATING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 32,
}
"""Two kinds of attention, so that vLLM makes several KV cache groups."""

_GATED = [
    TinyModel("llama", "LlamaConfig", mlp="LlamaMLP"),
    TinyModel("llama_tied", "LlamaConfig", {"tie_word_embeddings": True}, mlp="LlamaMLP"),
    TinyModel("llama_mlp_bias", "LlamaConfig", {"mlp_bias": True}, mlp="LlamaMLP"),
    TinyModel("mistral", "MistralConfig", {"sliding_window": None}, mlp="LlamaMLP"),
    TinyModel("mistral_sliding", "MistralConfig", {"sliding_window": 32}, mlp="LlamaMLP"),
    TinyModel("qwen2", "Qwen2Config", _SQUARE, mlp="Qwen2MLP"),
    TinyModel("qwen3", "Qwen3Config", mlp="Qwen2MLP"),
    TinyModel("gemma", "GemmaConfig", mlp="GemmaMLP", act="GeluAndMul"),
    TinyModel(
        "gemma2",
        "Gemma2Config",
        {**_ALTERNATING, "query_pre_attn_scalar": 2, "tie_word_embeddings": True},
        mlp="Gemma2MLP",
        act="GeluAndMul",
        layers=4,
    ),
    TinyModel(
        "gemma3",
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "sliding_window": 32,
            "query_pre_attn_scalar": 32,
        },
        mlp="Gemma3MLP",
        act="GeluAndMul",
        layers=4,
    ),
    TinyModel(
        "gemma4",
        "Gemma4TextConfig",
        {
            **_ALTERNATING,
            "tie_word_embeddings": True,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
        mlp="Gemma4MLP",
        act="GeluAndMul",
        layers=4,
    ),
    TinyModel(
        "gemma4_kv_heads",
        "Gemma4TextConfig",
        {
            **_ALTERNATING,
            "tie_word_embeddings": True,
            "hidden_size_per_layer_input": 0,
            "per_layer_config": {1: {"num_key_value_heads": 1}, 3: {"num_key_value_heads": 1}},
        },
        mlp="Gemma4MLP",
        act="GeluAndMul",
        layers=4,
    ),
    TinyModel("phi3", "Phi3Config", mlp="LlamaMLP"),
    TinyModel(
        "granite",
        "GraniteConfig",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.8, "logits_scaling": 0.7},
        mlp="GraniteMLP",
    ),
    TinyModel("glm4", "Glm4Config", mlp="LlamaMLP"),
    TinyModel(
        "cohere",
        "CohereConfig",
        {"logit_scale": 1.5, "tie_word_embeddings": True},
        mlp="CohereMLP",
    ),
    TinyModel(
        "cohere2",
        "Cohere2Config",
        {**_ALTERNATING, "logit_scale": 1.5, "tie_word_embeddings": True},
        mlp="CohereMLP",
        layers=4,
    ),
    TinyModel("stablelm", "StableLmConfig", _SQUARE, mlp="StablelmMLP"),
    TinyModel(
        "exaone4",
        "Exaone4Config",
        _ALTERNATING,
        mlp="Exaone4GatedMLP",
        layers=4,
    ),
    TinyModel("ernie45", "Ernie4_5Config", mlp="LlamaMLP"),
    TinyModel(
        "hyperclovax",
        "HyperCLOVAXConfig",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.8},
        mlp="HyperCLOVAXMLP",
    ),
    TinyModel(
        "internlm2",
        "LlamaConfig",
        _SQUARE,
        architecture="InternLM2ForCausalLM",
        extra={"bias": False},
        rename=_internlm2_names,
        mlp="InternLM2MLP",
        children=("gate_up_proj", "act_fn", "w2"),
    ),
    TinyModel(
        "exaone",
        "LlamaConfig",
        architecture="ExaoneForCausalLM",
        extra={"activation_function": "silu", "layer_norm_epsilon": 1e-6},
        rename=_exaone_names,
        mlp="ExaoneGatedMLP",
        children=("gate_up_proj", "act_fn", "c_proj"),
    ),
    TinyModel(
        "minicpm_fatrelu",
        "LlamaConfig",
        _SQUARE,
        architecture="MiniCPMForCausalLM",
        extra={
            "hidden_act": "fatrelu",
            "hidden_act_param": 0.05,
            "scale_emb": 1,
            "scale_depth": math.sqrt(_SIZES["num_hidden_layers"]),
            "dim_model_base": 128,
            "num_experts": 0,
        },
        mlp="MiniCPMMLP",
        act="FatreluAndMul",
    ),
    TinyModel("olmo2", "Olmo2Config", mlp="Olmo2MLP", backend="transformers"),
    TinyModel(
        "olmo3",
        "Olmo3Config",
        _ALTERNATING,
        mlp="Olmo3MLP",
        layers=4,
        backend="transformers",
    ),
    TinyModel(
        "smollm3_geglu",
        "SmolLM3Config",
        {"hidden_act": "gelu"},
        mlp="SmolLM3MLP",
        act="GeluAndMul",
        backend="transformers",
    ),
]

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}

_MIXED = [
    TinyModel(
        "gemma3n",
        "Gemma3nTextConfig",
        {
            **_ALTERNATING,
            "tie_word_embeddings": True,
            "intermediate_size": [176] * 4,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
            "laurel_rank": 16,
        },
        mlp="Gemma3nMLP",
        act="GeluAndMulSparse",
        layers=4,
    ),
    TinyModel(
        "qwen3_moe_dense_first",
        "Qwen3MoeConfig",
        {**_MOE, "mlp_only_layers": [0], "decoder_sparse_step": 1, "norm_topk_prob": True},
        mlp="Qwen3MoeMLP",
        layers=1,
    ),
]

_REFUSED = [
    TinyModel(
        "opt",
        "OPTConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": _HIDDEN,
            "word_embed_proj_dim": _HIDDEN,
            "ffn_dim": 176,
            "tie_word_embeddings": False,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": MAX_LEN,
        },
        common=False,
        refusal="non-gated FFN",
    ),
    TinyModel(
        "gpt2",
        "GPT2Config",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": _HIDDEN,
            "n_layer": 3,
            "n_head": 2,
            "n_inner": 176,
            "n_positions": MAX_LEN,
        },
        common=False,
        refusal="non-gated FFN",
    ),
    TinyModel(
        "gpt_neox",
        "GPTNeoXConfig",
        {"num_attention_heads": 2, "rotary_pct": 1.0},
        backend="transformers",
        refusal="non-gated FFN",
    ),
    TinyModel("starcoder2", "Starcoder2Config", backend="transformers", refusal="non-gated FFN"),
    TinyModel(
        "nemotron",
        "NemotronConfig",
        {"partial_rotary_factor": 1.0},
        refusal="non-gated FFN",
    ),
    TinyModel(
        "mamba2",
        "Mamba2Config",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": _HIDDEN,
            "num_hidden_layers": 3,
            "state_size": 16,
            "num_heads": 4,
            "head_dim": 32,
            "expand": 2,
            "n_groups": 1,
            "chunk_size": 32,
            "tie_word_embeddings": False,
        },
        common=False,
        refusal="mamba layers",
    ),
    TinyModel(
        "falcon_h1",
        "FalconH1Config",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 2,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_chunk_size": 32,
            "mlp_multipliers": [0.8, 1.2],
        },
        mlp="FalconH1MLP",
        refusal="mamba layers",
    ),
    TinyModel(
        "lfm2",
        "Lfm2Config",
        {
            **_SQUARE,
            "tie_word_embeddings": True,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
        extra={"conv_dim": 128, "block_dim": 128},
        mlp="Lfm2MLP",
        children=("w13", "act_fn", "w2"),
        refusal="short-convolution layers",
    ),
    TinyModel(
        "mixtral",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        refusal="mixture of experts without a dense FFN",
    ),
    TinyModel(
        "qwen3_moe",
        "Qwen3MoeConfig",
        {**_MOE, "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True},
        refusal="mixture of experts without a dense FFN",
    ),
    TinyModel(
        "deepseek_mla",
        "DeepseekV2Config",
        {
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "n_group": 1,
            "topk_group": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
        },
        mlp="DeepseekV2MLP",
        refusal="latent attention",
    ),
    TinyModel(
        "bert_embedding",
        "BertConfig",
        {"num_attention_heads": 2, "type_vocab_size": 2},
        model="BertModel",
        refusal="pooling model",
    ),
    TinyModel(
        "qwen2_embedding",
        "Qwen2Config",
        _SQUARE,
        model="Qwen2Model",
        mlp="Qwen2MLP",
        refusal="pooling model",
    ),
]

TINY_MODELS: dict[str, TinyModel] = {m.name: m for m in (*_GATED, *_MIXED, *_REFUSED)}
GATED: tuple[str, ...] = tuple(m.name for m in _GATED)
MIXED: tuple[str, ...] = tuple(m.name for m in _MIXED)
REFUSED: tuple[str, ...] = tuple(m.name for m in _REFUSED)


def build(name: str, root: Path, variant: int = 0) -> Path:
    """Makes one model, or returns at once if it is there already.

    The folder is written under a temporary name and renamed when it is complete, so a broken
    run leaves nothing that looks like a model and parallel test workers may race.

    Args:
        name: Key of `TINY_MODELS`.
        root: Folder that holds the models; made if missing.
        variant: Models of one name differ in their weights by it, and in nothing else.

    Returns:
        The model's folder: config.json, model.safetensors and a tokenizer.
    """
    tiny = TINY_MODELS[name]
    target = root / f"{name}-{variant}-{_STAMP:08x}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
    try:
        _write_model(tiny, work, variant)
        _write_tokenizer(work)
        work.chmod(0o755)
        work.rename(target)
    except OSError:
        if not target.is_dir():  # another worker was faster if it exists
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write_model(tiny: TinyModel, folder: Path, variant: int) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    options = {**(_SIZES if tiny.common else {}), **tiny.options}
    options |= {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    config = getattr(transformers, tiny.config)(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{tiny.name}.{_SEED + variant}".encode()))
        if tiny.model:
            model = getattr(transformers, tiny.model)(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model = model.float()
        _randomise(model)
    model.save_pretrained(folder)

    config_path = folder / "config.json"
    saved = json.loads(config_path.read_text())
    saved |= tiny.extra
    if tiny.architecture:
        saved["architectures"] = [tiny.architecture]
    config_path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    if tiny.rename is not None:
        weights = folder / "model.safetensors"
        renamed = tiny.rename(load_file(weights))
        save_file({k: v.contiguous() for k, v in renamed.items()}, weights, {"format": "pt"})


def _randomise(model: transformers.PreTrainedModel) -> None:
    """Draws weights under which the next token depends on every layer and on the FFN.

    A usual initialisation (std 0.02) gives nearly equal logits, and one token for ever. Here a
    matrix keeps the scale of its input (std = gain / sqrt(fan-in)), neurons differ in size as
    in trained models, so that choosing among them has a meaning, and embeddings are small
    beside what the layers add, so that a tied head does not just repeat its input. Norms and
    biases move away from 1 and 0, so that a forgotten one shows. Convolutions and state-space
    parameters keep their own initialisation.
    """
    import torch

    tied = model.config.tie_word_embeddings
    is_conv1d = type(model).__name__.startswith("GPT2")  # matrices stored [in, out]
    for name, param in model.named_parameters():
        with torch.no_grad():
            if "embed_out" in name or "lm_head" in name:
                param.normal_(0.0, 3.0 / math.sqrt(param.shape[-1]))
            elif "norm" in name.lower() or "ln_" in name:
                param.add_(torch.randn_like(param) * 0.1)
                if tied and name in _FINAL_NORMS:
                    param.add_(15.0)  # small embeddings would give flat logits
            elif "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
                param.normal_(0.0, 0.02 if tied else 0.1)
            elif name.endswith("bias") and param.ndim == 1:
                param.normal_(0.0, 0.1)
            elif param.ndim >= 2 and "conv" not in name:
                fan_in = param.shape[-2 if is_conv1d else -1]
                param.normal_(0.0, 1.0 / math.sqrt(fan_in))
                if name.endswith(("gate_proj.weight", "up_proj.weight")):
                    param.mul_(torch.randn(param.shape[0], 1).mul(_NEURON_SPREAD).exp())


def _write_tokenizer(folder: Path) -> None:
    """One token per byte, so that any text has ids and any byte id has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    fillers = [f"<filler_{i}>" for i in range(VOCAB_SIZE - len(alphabet) - len(special))]
    vocab = {token: i for i, token in enumerate([*alphabet, *special, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        model_max_length=MAX_LEN,
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
