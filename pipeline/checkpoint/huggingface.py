"""A Hugging Face checkpoint folder -> configuration and lazy weights, read without trust and without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowbit.pipeline.checkpoint.files import present_file, read_json
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight, read_header
from lowbit.pipeline.errors import CheckpointError

SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
"""What travels with the weights into the result, where the checkpoint has it."""


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
        """config.json as it is written, before any library interprets it."""
        return self.read_json("config.json")

    @cached_property
    def weights(self) -> dict[str, CheckpointWeight]:
        """Every tensor of every shard, by its checkpoint name; only headers are read.

        Raises:
            CheckpointError: a file is cut short, its header lies, a shard is missing, or all there is
                is a pickle.
        """
        weights: dict[str, CheckpointWeight] = {}
        for file in self._shards():
            weights |= read_header(file)
        return weights

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; {} when the file is absent."""
        return read_json(self.folder, name)

    def side_files(self) -> dict[str, Path]:
        """What travels with the weights, by name; each may be read."""
        present = {name: present_file(self.folder, name) for name in SIDE_FILES}
        return {name: file for name, file in present.items() if file is not None}

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if present_file(self.folder, index.name) is not None:
            shards = self.read_json(index.name).get("weight_map", {})
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise CheckpointError(f"{index}: its weight_map does not name shards by the tensors in them.")
            names = sorted(set(shards.values()))
            for name in names:
                if Path(name).name != name or name == "..":
                    raise CheckpointError(f"{index}: shard '{name}' is not a plain file name.")
                if not (self.folder / name).is_file():
                    raise CheckpointError(f"{index}: names the shard '{name}', which is not in {self.folder}.")
            return [self.folder / name for name in names]
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            return files
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
        CheckpointError: there is no such folder, or a file is none, a link out of it, or too large.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder. Give one with config.json and .safetensors.")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint.")
    checkpoint = Checkpoint(folder, source, revision)
    checkpoint.side_files()  # refused now if libraries that read the folder by themselves might be led out of it
    return checkpoint
