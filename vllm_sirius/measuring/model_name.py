"""Judges the name of a model before anything slow starts. Leaf module."""

from __future__ import annotations

from pathlib import Path

from vllm_sirius.errors import SiriusConfigError

CONFIGS = ("config.json", "params.json")
"""Files of which vLLM reads one in a model's folder; the second is Mistral's own format."""


def check_model_name(model: str) -> None:
    """Refuses a path where there is no model; hub names are vLLM's to find.

    Args:
        model: Path or hub name.

    Raises:
        SiriusConfigError: Naming the path and the remedy.
    """
    remedy = "give a folder with a config.json, or a hub name such as Qwen/Qwen2.5-1.5B-Instruct"
    if not model.strip():
        raise SiriusConfigError(f"MODEL={model!r} is empty: {remedy}.")
    path = Path(model).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise SiriusConfigError(f"MODEL={model!r} is no path ({error}): {remedy}.") from error
    if is_folder and not any((path / name).is_file() for name in CONFIGS):
        raise SiriusConfigError(f"MODEL={model} is a folder without a config.json, so no model: {remedy}.")
    if exists and not is_folder and path.suffix != ".gguf":
        raise SiriusConfigError(f"MODEL={model} is a file: {remedy}.")
    # A hub name has one slash at most, and does not begin with a dot or a tilde.
    if not exists and (model.count("/") > 1 or model.startswith(("/", ".", "~"))):
        raise SiriusConfigError(f"MODEL={model} does not exist: {remedy}.")
