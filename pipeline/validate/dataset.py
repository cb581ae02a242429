"""What models are run on to be compared: windows of text for decoders, whole inputs for any other graph."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import known_ids, load_tokenizer
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.limits import INPUT_BYTES
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.store.digests import digest

SEED = 0
TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


def decoder_samples(windows: npt.NDArray[np.int64]) -> list[Feeds]:
    """Token ids int64 [windows, tokens] as one sample each."""
    return [{"input_ids": window[None]} for window in windows]


def samples_digest(samples: list[Feeds]) -> str:
    """A digest of all arrays."""
    return digest(*({name: [str(value.dtype), value.tolist()] for name, value in sample.items()} for sample in samples))


def samples_for(recipe: Recipe, checkpoint: Checkpoint, graph: gs.Graph) -> list[Feeds]:
    """Inputs of a graph that is no decoder: the recipe's own file, windows of text, or noise.

    Raises:
        PipelineError: the file does not fit the graph, or nobody can tell what an input may be.
    """
    options = recipe.validate or Validate()
    if options.inputs is not None:
        return [_from_file(recipe.folder / options.inputs, graph)]
    names = {tensor.name for tensor in graph.inputs}
    if "input_ids" in names and names <= TEXT_INPUTS and (checkpoint.folder / "tokenizer.json").exists():
        _check_positions(options.window, checkpoint)
        return [_text(window, names) for window in token_windows(recipe, checkpoint)]
    generator = np.random.default_rng(SEED)
    return [{tensor.name: _noise(tensor, checkpoint, generator) for tensor in graph.inputs} for _ in range(4)]


def positions(checkpoint: Checkpoint) -> int | None:
    """Tokens that a model has learned positions for; RoBERTa's begin after its padding token's. None: nothing says."""
    config = checkpoint.config
    before = (config.get("pad_token_id", 1) or 0) + 1 if "roberta" in config.get("model_type", "") else 0
    longest = config.get("max_position_embeddings")
    return None if longest is None else int(longest) - before


def _check_positions(window: int, checkpoint: Checkpoint) -> None:
    longest = positions(checkpoint)
    if longest is not None and window > longest:
        raise PipelineError(
            f"validate: a window of {window} tokens, but the model has {longest} positions. Set validate: {{window: "
            f"{longest}}}, or fewer."
        )


def _text(window: npt.NDArray[np.int64], names: set[str]) -> Feeds:
    count = len(window)
    every = {
        "input_ids": window[None], "attention_mask": np.ones((1, count), np.int64),
        "token_type_ids": np.zeros((1, count), np.int64), "position_ids": np.arange(count)[None],
    }  # fmt: skip
    return {name: every[name] for name in names}


def _from_file(path: Path, graph: gs.Graph) -> Feeds:
    try:
        with zipfile.ZipFile(path) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > INPUT_BYTES:
                raise PipelineError(f"validate: {path}: its arrays are larger than {INPUT_BYTES >> 30} GB ({size:,} bytes).")
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:  # TypeError: one array, in an .npy file
        raise PipelineError(f"validate: {path}: cannot be read as an .npz file of arrays: {error}") from error
    if odd := [name for name, values in arrays.items() if not isinstance(values, np.ndarray)]:
        raise PipelineError(f"validate: {path}: '{odd[0]}' is no array.")
    wanted = {tensor.name: np.dtype(tensor.dtype) for tensor in graph.inputs}
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
    if set(arrays) != set(wanted):
        raise PipelineError(f"validate: {path} holds {sorted(arrays)}, the model takes {sorted(wanted)}.")
    for name, dtype in wanted.items():
        if arrays[name].dtype != dtype:
            raise PipelineError(f"validate: {path}: '{name}' is {arrays[name].dtype}, the model takes {dtype}.")
        if not _fits(arrays[name].shape, shapes[name]):
            raise PipelineError(f"validate: {path}: '{name}' is {list(arrays[name].shape)}, the model takes {shapes[name]}.")
        if dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            raise PipelineError(f"validate: {path}: '{name}' has values that are not finite; nothing can be compared on them.")
    return arrays


def _fits(shape: tuple[int, ...], declared: Sequence[int | str] | None) -> bool:
    """Whether an array has something in it, and the sizes that a graph declares as numbers."""
    if 0 in shape or declared is None:
        return 0 not in shape
    return len(shape) == len(declared) and all(
        size == wanted for size, wanted in zip(shape, declared, strict=True) if isinstance(wanted, int)
    )


def _noise(tensor: gs.Tensor, checkpoint: Checkpoint, generator: np.random.Generator) -> npt.NDArray[Any]:
    """Normal noise of the shape that the graph declares, or that the configuration of a model of images does."""
    config = checkpoint.config
    side = config.get("image_size", 0)
    known: dict[str, int] = {"batch_size": 1, "num_channels": config.get("num_channels", 3), "height": side, "width": side}
    first, *rest = tensor.shape or [1]
    shape = [
        first if isinstance(first, int) else 1,
        *(size if isinstance(size, int) else known.get(str(size), 0) for size in rest),
    ]
    if np.dtype(tensor.dtype).kind != "f" or 0 in shape:
        raise PipelineError(
            f"validate: nobody can tell what the input '{tensor.name}' ({np.dtype(tensor.dtype)} {list(tensor.shape)}) may be. "
            "Save an example of every input with numpy.savez and name the file: validate: {inputs: examples.npz}."
        )
    return generator.standard_normal(shape).astype(tensor.dtype)


def token_windows(recipe: Recipe, checkpoint: Checkpoint) -> npt.NDArray[np.int64]:
    """The tokens to validate on, int64 [windows, window].

    Raises:
        CheckpointError: there is no tokenizer.
        PipelineError: there is no such text, or it has fewer tokens than one window.
    """
    options = recipe.validate or Validate()
    ids = np.array(
        known_ids(load_tokenizer(checkpoint).encode(validation_text(options, recipe.folder)).ids, checkpoint), np.int64
    )
    count = min(options.windows, len(ids) // options.window)
    if count == 0:
        raise PipelineError(f"validate: the text has {len(ids)} tokens, less than one window of {options.window}.")
    return ids[: count * options.window].reshape(count, options.window)


def validation_text(options: Validate, folder: Path) -> str:
    """The text to validate on: the recipe's file, or what every CPython carries."""
    if options.text is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    path = folder / options.text
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"validate: {path}: cannot be read as UTF-8 text: {error}") from error
