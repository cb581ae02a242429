"""A model id on the Hugging Face Hub -> a local folder."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.checkpoint.huggingface import SIDE_FILES, Checkpoint, open_checkpoint
from lowbit.pipeline.checkpoint.onnx_model import open_onnx
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.sections import ONNX_SUFFIX, Model, place_of

PATTERNS = [*SIDE_FILES, "*.safetensors", "model.safetensors.index.json"]


def resolve(recipe: Recipe, override: Path | None, download: bool = True) -> Checkpoint:
    """The checkpoint (or ONNX file) of a recipe: the one given by hand, the recipe's own, or one from the Hub.

    Downloads show their progress and resume where they were cut off.

    Args:
        override: the folder of `model=`, or None.
        download: whether the Hub may be asked; otherwise only what is cached already counts.
    """
    model = recipe.model
    if override is not None:
        return _open(override, str(override))
    if model.is_folder:
        return _open(place_of(recipe.folder, model.source), model.source)
    return _fetch(model, f"name it: make recipe={recipe.name} model=/path/to/folder", download)


def open_model(source: str) -> Checkpoint:
    """A model that no recipe names yet: a folder, an ONNX file, or one from the Hub."""
    model = Model(source=source)
    return _open(place_of(Path(), source), source) if model.is_folder else _fetch(model, "give that in place of the id.", True)


def _fetch(model: Model, remedy: str, download: bool) -> Checkpoint:
    # the Hub's client takes a second to import
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model.source, revision=model.revision, allow_patterns=PATTERNS, local_files_only=not download
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model.source}: cannot be fetched from the Hugging Face Hub ({reason[:200]}). If you have the checkpoint in a "
            f"folder, {remedy}"
        ) from error
    return open_checkpoint(Path(folder), model.source, Path(folder).name)  # the snapshot is named by its commit


def _open(path: Path, source: str) -> Checkpoint:
    return open_onnx(path, source) if path.suffix == ONNX_SUFFIX else open_checkpoint(path, source)
