"""Tiny random-weight models that real vLLM loads on CPU: their seeded weights, tokenizer and folder (`tiny_catalogue` has
the list).

Everything is made locally, no network and no hub cache. Does not own any engine: the tests start vLLM themselves.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from support import tiny_catalogue, tiny_model
from support.tiny_catalogue import TINY_MODELS
from support.tiny_model import MAX_LEN, SIZES, VOCAB_SIZE, TinyModel

if TYPE_CHECKING:
    import transformers

PAD_ID, BOS_ID, EOS_ID = 256, 257, 258
FIRST_CHARACTER = ord("!")
"""Character of token 0; those of ASCII follow."""
_SEED = 1
"""Chosen so that no model falls into a loop of a few tokens."""
_NEURON_SPREAD = 0.5
"""Standard deviation of the logarithm of a neuron's size."""
_SOURCES = (__file__, tiny_catalogue.__file__, tiny_model.__file__)
_STAMP = zlib.crc32(b"".join(Path(source).read_bytes() for source in _SOURCES))
"""Part of each folder's name, so that an edited catalogue never finds an old model."""

_FINAL_NORMS = (
    "model.norm.weight",
    "model.embedding_norm.weight",
    "model.decoder.final_layer_norm.weight",
    "transformer.ln_f.weight",
)


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

    options = {**(SIZES if tiny.common else {}), **tiny.options}
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
