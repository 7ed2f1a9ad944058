"""Turns a GGUF file into a bf16 safetensors folder that vLLM serves.

Owns the dequantised weights, the tokenizer with its chat template, and the generation settings. It knows
nothing about where the file came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_catalogue import Model, ModelError


def convert(model: Model, gguf: Path, target: Path) -> None:
    """Write the bf16 folder of a model.

    Args:
        model: The catalogue entry; says what the file does not carry.
        gguf: The verified GGUF file.
        target: Folder to write; made if it is missing.

    Raises:
        ModelError: The file does not hold what the catalogue promises.
    """
    tokenizer = load_tokenizer(model, gguf)
    weights = load_weights(gguf)
    target.mkdir(parents=True, exist_ok=True)
    weights.generation_config = generation_config(model, tokenizer)
    weights.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load_weights(gguf: Path) -> Any:
    """Read and dequantise the weights.

    A model that transformers read from GGUF keeps a mark of its quantisation and refuses to be saved, so
    the tensors move into a fresh model of the same configuration. It is built on the meta device: no
    second copy of the weights exists at any time.

    Args:
        gguf: The GGUF file.

    Returns:
        A transformers model with bf16 parameters.
    """
    import torch
    import transformers

    options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    # Releases that can keep weights packed do so wherever a kernel exists, unless told otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    config = loaded.config
    for stale in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, stale):
            delattr(config, stale)
    with torch.device("meta"):
        fresh = type(loaded)(config)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    fresh.load_state_dict(tensors, assign=True)
    fresh.tie_weights()
    return fresh


def load_tokenizer(model: Model, gguf: Path) -> Any:
    """Read the tokenizer and restore what the GGUF reader loses.

    Args:
        model: The catalogue entry.
        gguf: The GGUF file.

    Returns:
        A transformers tokenizer.

    Raises:
        ModelError: The file has no chat template although the model needs one.
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    if model.digits_split_alone:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if model.unicode_normalizer:
        backend.normalizer = normalizers.NFC()
    if model.starts_with_bos:
        tokenizer.add_bos_token = True
    if model.has_chat_template and not tokenizer.chat_template:
        raise ModelError(f"the file of {model.name} has no chat template; the package has changed")
    return tokenizer


def generation_config(model: Model, tokenizer: Any) -> Any:
    """Return generation settings that name every token ending an answer.

    Only token ids are written: vLLM would take sampling settings found here as defaults of every request.

    Args:
        model: The catalogue entry.
        tokenizer: The tokenizer of the model.

    Returns:
        A transformers `GenerationConfig`.

    Raises:
        ModelError: The tokenizer lacks one of the end tokens.
    """
    from transformers import GenerationConfig

    vocabulary = tokenizer.get_vocab()
    missing = [token for token in model.end_tokens if token not in vocabulary]
    if missing:
        raise ModelError(f"the tokenizer of {model.name} lacks {missing}; the package has changed")
    ids = [vocabulary[token] for token in model.end_tokens]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids if len(ids) > 1 else ids[0],
        pad_token_id=tokenizer.pad_token_id,
    )
