"""A catalogue of tiny models: configs that real vLLM loads on CPU, and what is known of each. `tiny_models` writes them.

Three lists split the catalogue. `GATED` holds decoders whose FFN is gated (SwiGLU or GeGLU), in
every spelling of the child modules that vLLM uses; the plugin must serve them. `REFUSED` holds
models that it must refuse, each with the reason in `TinyModel.refusal`. `MIXED` holds the cases
between the two, whose treatment is the plugin's decision: sparse experts in some layers and a
dense gated FFN in others, and an activation that prunes neurons by itself.

Three checkpoints have no config class in transformers (InternLM2, EXAONE 3, MiniCPM). They are
written from a Llama with the names changed, and vLLM picks its own class from `architectures`.
"""

from __future__ import annotations

import math

from support.tiny_model import HIDDEN, MAX_LEN, SIZES, VOCAB_SIZE, TinyModel, exaone_names, internlm2_names

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
        rename=internlm2_names,
        mlp="InternLM2MLP",
        children=("gate_up_proj", "act_fn", "w2"),
    ),
    TinyModel(
        "exaone",
        "LlamaConfig",
        architecture="ExaoneForCausalLM",
        extra={"activation_function": "silu", "layer_norm_epsilon": 1e-6},
        rename=exaone_names,
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
            "scale_depth": math.sqrt(SIZES["num_hidden_layers"]),
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
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
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
            "n_embd": HIDDEN,
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
            "hidden_size": HIDDEN,
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
