"""Writes a checkpoint of random weights in the shape of a 7B: `python -m benchmarks.offload.random_model FOLDER`.

It says what a model of that size needs and how fast it is read. What it answers is noise, so that nothing about drafts
follows from it. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks.errors import BenchmarkError, exit_status

MARKER = "random_weights"
"""Key of the config that says so."""

SHARD_BYTES = 4 << 30
SPREAD = 0.02
"""Standard deviation of the weights, as models of this kind begin their training with."""

TOKENIZER_FILES = ("tokenizer*", "chat_template*", "vocab*", "merges*", "special_tokens_map*", "generation_config*")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Qwen2 model.

    Attributes:
        hidden: Width.
        ffn: Neurons of an FFN.
        layers: Layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocabulary: Tokens.
    """

    hidden: int = 3584
    ffn: int = 18944
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    vocabulary: int = 152064

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes, in the order in which they are written."""
        keys = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            yield f"{name}.input_layernorm.weight", (self.hidden,)
            for projection, outputs in (("q", self.hidden), ("k", keys), ("v", keys)):
                yield f"{name}.self_attn.{projection}_proj.weight", (outputs, self.hidden)
                yield f"{name}.self_attn.{projection}_proj.bias", (outputs,)
            yield f"{name}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{name}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{name}.mlp.gate_proj.weight", (self.ffn, self.hidden)
            yield f"{name}.mlp.up_proj.weight", (self.ffn, self.hidden)
            yield f"{name}.mlp.down_proj.weight", (self.hidden, self.ffn)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            MARKER: True,
        }


def num_bytes(shape: Shape) -> int:
    """Bytes of a bf16 tensor."""
    return torch.Size(shape).numel() * torch.bfloat16.itemsize


def shards(tensors: Sequence[tuple[str, Shape]], most_bytes: int) -> list[list[tuple[str, Shape]]]:
    """Divides tensors among files.

    Args:
        tensors: Names and shapes.
        most_bytes: Size of a file, which only a larger tensor exceeds.
    """
    found: list[list[tuple[str, Shape]]] = []
    room = 0
    for name, shape in tensors:
        if not found or num_bytes(shape) > room:
            found.append([])
            room = most_bytes
        found[-1].append((name, shape))
        room -= num_bytes(shape)
    return found


def write_model(folder: Path, tokenizer: Path, sizes: Sizes, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a checkpoint.

    Args:
        folder: Where to; it must not have one yet.
        tokenizer: Folder of a model whose tokenizer files are taken.
        sizes: Of the model.
        seed: Of the weights.
        shard_bytes: Size of a file.

    Raises:
        BenchmarkError: If there is a model already, no tokenizer, or too little room.
    """
    if (folder / "config.json").exists():
        raise BenchmarkError(f"{folder}: there is a model already; give another folder")
    files = [file for pattern in TOKENIZER_FILES for file in sorted(tokenizer.glob(pattern))]
    if not files:
        raise BenchmarkError(f"--tokenizer {tokenizer}: there are no tokenizer files")
    tensors = list(sizes.tensors())
    total = sum(num_bytes(shape) for _, shape in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < total:
        raise BenchmarkError(f"{folder}: the model takes {total / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
    for file in files:
        shutil.copy2(file, folder / file.name)
    generator = torch.Generator().manual_seed(seed)
    divided = shards(tensors, shard_bytes)
    places = {}
    for number, shard in enumerate(divided, start=1):
        name = f"model-{number:05d}-of-{len(divided):05d}.safetensors"
        with (folder / name).open("wb") as opened:
            _write_shard(opened, shard, generator)
        places.update({tensor: name for tensor, _ in shard})
        print(f"{name}: {len(shard)} tensors", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    # Last, so that a folder with a config is a whole model.
    (folder / "config.json").write_text(json.dumps(sizes.config(), indent=2), encoding="utf-8")


def _write_shard(file: BinaryIO, tensors: Sequence[tuple[str, Shape]], generator: torch.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + num_bytes(shape)]}
        end += num_bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in tensors:
        if "norm" in name:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, SPREAD, generator=generator)
        file.write(tensor.view(torch.uint8).numpy().data)


def has_random_weights(model: str) -> bool:
    """Whether a checkpoint is one of these.

    Args:
        model: Its folder.
    """
    config = Path(model, "config.json")
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get(MARKER))


def run(given: argparse.Namespace) -> int:
    """Carries out a parsed command.

    Args:
        given: The command line.

    Returns:
        Exit status.
    """
    write_model(given.folder, given.tokenizer, Sizes(layers=given.layers), given.seed)
    print(f"{given.folder}: a model of random weights", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes a model.

    Args:
        arguments: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 1 after a failure, 130 after an interruption.
    """
    parser = argparse.ArgumentParser(
        prog="benchmarks.offload.random_model", description="Writes a checkpoint of random weights, 15 GB by default."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen2 model: its tokenizer is taken")
    parser.add_argument("--layers", type=int, default=Sizes.layers, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return exit_status(functools.partial(run, parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
