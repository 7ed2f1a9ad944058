"""Questions as a model's users put them: token ids in its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_sirius.errors import ModelError, one_line


def tokenize(model: str, texts: Sequence[str], trust_remote_code: bool = False) -> list[list[int]]:
    """Token ids of user messages in a model's chat template, or of the plain text where the model has none.

    Args:
        model: Path or hub name.
        texts: The messages.
        trust_remote_code: Whether a tokenizer may bring code of its own.

    Returns:
        Token ids of each message.

    Raises:
        ModelError: If the model has no tokenizer that works, or its chat template refuses a message.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        return _token_ids(tokenizer, texts)
    except Exception as error:  # a tokenizer raises whatever its library, template or own code does
        raise ModelError(f"the tokenizer of {model} does not work: {one_line(error)}") from error


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not tokenizer.chat_template:
        return [tokenizer(text)["input_ids"] for text in texts]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    return [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats]
