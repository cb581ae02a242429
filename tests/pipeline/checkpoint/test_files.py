"""Every file of a checkpoint is opened in one place, which follows no link out of it and waits for no pipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.pipeline.checkpoint.chat_template import chat_template
from lowbit.pipeline.checkpoint.huggingface import SIDE_FILES, open_checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.limits import TEXT_BYTES

INDEX = "model.safetensors.index.json"
NAMES = [*SIDE_FILES, INDEX, "model.safetensors"]


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny("llama"), tmp_path / "outer" / "model")


def read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, "")
    assert checkpoint.weights
    load_tokenizer(checkpoint)
    chat_template(checkpoint)


def put(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


@pytest.mark.parametrize("name", NAMES)
def test_links_out_of_the_folder_are_refused(model: Path, name: str) -> None:
    secret = model.parent / "id_rsa"
    secret.write_text('{"model_type": "llama"}')
    put(model, name, lambda path: path.symlink_to("../id_rsa"))
    with pytest.raises(CheckpointError, match=f"{name}: is a link to {secret}, outside the checkpoint"):
        read(model)


@pytest.mark.parametrize("name", NAMES)
def test_pipes_devices_and_folders_are_refused_at_once(model: Path, name: str) -> None:
    for make, remove in ((os.mkfifo, Path.unlink), (Path.mkdir, Path.rmdir)):
        put(model, name, make)
        with pytest.raises(CheckpointError, match=f"{name}: is no regular file but a folder, a pipe or a device"):
            read(model)
        remove(model / name)
    put(model, name, lambda path: path.symlink_to("/dev/zero"))
    with pytest.raises(CheckpointError, match="is a link to /dev/zero, outside the checkpoint"):
        read(model)


@pytest.mark.parametrize("name", [*SIDE_FILES, INDEX])
def test_a_file_of_zeros_is_not_read(model: Path, name: str) -> None:
    with (model / name).open("wb") as stream:
        stream.truncate(TEXT_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"{name}: has 67,108,865 bytes, at most 67,108,864 are read"):
        read(model)


@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_broken_links_are_refused(model: Path, target: str) -> None:
    put(model, "generation_config.json", lambda path: path.symlink_to(path.name if target == "itself" else "nowhere"))
    with pytest.raises(CheckpointError, match=r"generation_config.json: cannot be opened"):
        read(model)


def test_links_within_the_folder_and_into_the_blobs_of_the_hub_are_followed(model: Path, tmp_path: Path) -> None:
    read(model)
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "commit", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(model.iterdir()):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    read(snapshot)
    (model / "real").mkdir()
    for file in list(model.glob("*.json")):
        file.rename(model / "real" / file.name)
        file.symlink_to(f"real/{file.name}")
    read(model)


def test_not_utf8_is_a_sentence(model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: cannot be read as UTF-8 text"):
        read(model)
