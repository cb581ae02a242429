"""A Hugging Face checkpoint folder -> configuration and lazy weights, read without trust and without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowbit.pipeline.checkpoint.config_schema import checked_config
from lowbit.pipeline.checkpoint.files import present_file, read_json
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight, read_header
from lowbit.pipeline.errors import CheckpointError

SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
"""What travels with the weights into the result, where the checkpoint has it."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of all weights, or that which says where each is."""
LONGEST_NAME = 255
"""Bytes of a file's name, on every system."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and .safetensors files.

    Attributes:
        folder: where it is.
        source: what the user called it, a path or a Hub id.
        revision: the commit on the Hub, or None.
    """

    folder: Path
    source: str
    revision: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it is written, before any library interprets it; its numbers are those of a model.

        Raises:
            CheckpointError: see `read_json` and `checked_config`.
        """
        return checked_config(self.read_json("config.json"), self.folder / "config.json")

    @cached_property
    def weights(self) -> dict[str, CheckpointWeight]:
        """Every tensor of every shard, by its checkpoint name; only headers are read.

        Raises:
            CheckpointError: a file is cut short, its header lies, a shard is missing, a tensor lies in two shards or not
                where the index says, or all there is is a pickle.
        """
        index = self._index()
        weights: dict[str, CheckpointWeight] = {}
        for file in self._shards(index):
            for name, weight in read_header(file).items():
                if name in weights:
                    raise CheckpointError(f"{file}: has '{name}', and so has {weights[name].file.name}. Keep the right one.")
                if index and index.get(name) != file.name:
                    where = f"puts it in '{index[name]}'" if name in index else "does not name it"
                    raise CheckpointError(f"{file}: has '{name}', but {INDEX} {where}. The two belong to different models.")
                weights[name] = weight
        return weights

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; {} when the file is absent."""
        return read_json(self.folder, name)

    def side_files(self) -> dict[str, Path]:
        """What travels with the weights, by name; each may be read."""
        present = {name: present_file(self.folder, name) for name in SIDE_FILES}
        return {name: file for name, file in present.items() if file is not None}

    def _index(self) -> dict[str, str]:
        """Shards by the tensors in them; {} without an index."""
        where = self.folder / INDEX
        if present_file(self.folder, INDEX) is None:
            return {}
        shards = self.read_json(INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{where}: its weight_map does not name shards by the tensors in them.")
        for name in sorted(set(shards.values())):
            if Path(name).name != name or name == ".." or len(name.encode()) > LONGEST_NAME:
                raise CheckpointError(f"{where}: shard '{name[:LONGEST_NAME]}' is not a plain file name.")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{where}: names the shard '{name}', which is not in {self.folder}.")
        return shards

    def _shards(self, index: dict[str, str]) -> list[Path]:
        """The files of the weights: as in transformers, model.safetensors is all there is where it exists."""
        files, whole = sorted(self.folder.glob("*.safetensors")), self.folder / WHOLE
        if index:
            if whole in files and set(index.values()) != {WHOLE}:
                raise CheckpointError(f"{self.folder}: has {WHOLE}, and an index of other files. Keep those that are right.")
            return [self.folder / name for name in sorted(set(index.values()))]
        if files:
            return [whole] if whole in files else files
        pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(kind))
        if pickles:
            raise CheckpointError(
                f"{self.folder}: has {pickles[0]} but no .safetensors file. A pickle can run any code when it is "
                "opened, so it is not read. Convert it once where you trust it: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)."
            )
        raise CheckpointError(f"{self.folder}: no .safetensors file here.")


def open_checkpoint(folder: Path, source: str, revision: str | None = None) -> Checkpoint:
    """A checkpoint folder that exists, has a configuration, and whose files may be read.

    Raises:
        CheckpointError: there is no such folder, or a file is none, a link out of it, too large, or nothing that this user may
            read.
    """
    try:
        return _opened(Checkpoint(folder, source, revision))
    except PermissionError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}). Get the right to read it.") from error


def _opened(checkpoint: Checkpoint) -> Checkpoint:
    folder = checkpoint.folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder. Give one with config.json and .safetensors.")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint.")
    checkpoint.side_files()  # refused now if libraries that read the folder by themselves might be led out of it
    return checkpoint
