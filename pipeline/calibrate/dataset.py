"""Options of `calibrate:` -> windows of tokens: of docstrings that every CPython carries, a file, or the float model itself."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import document_end, known_ids, load_tokenizer
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.sections import Calibrate
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.models import recall_model
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Store

Windows = npt.NDArray[np.int64]
"""Token ids, [windows, tokens]."""
SHORTEST = 200
"""Characters of the shortest docstring that is worth reading."""


def calibration_windows(options: Calibrate, folder: Path, checkpoint: Checkpoint, model_digest: str, store: Store) -> Windows:
    """The tokens to calibrate on, int64 [windows, window].

    Args:
        folder: that the recipe's paths are relative to.
        model_digest: of the checkpoint, for what it generates.

    Raises:
        PipelineError: the text cannot be read, or is too short.
    """
    if options.text == "generated":
        return _generated(options, folder, checkpoint, model_digest, store)
    tokenizer = load_tokenizer(checkpoint)
    wanted = options.windows * options.window
    end = document_end(checkpoint)
    ids: list[int] = []
    for text in _texts(options, folder):
        ids += known_ids(tokenizer.encode(text).ids, checkpoint) + end
        if len(ids) >= wanted:
            return np.array(ids[:wanted], np.int64).reshape(options.windows, options.window)
    raise PipelineError(
        f"calibrate: the text has {len(ids):,} tokens, {options.windows} windows of {options.window} need {wanted:,}. "
        "Ask for fewer windows, or give a longer text."
    )


def _texts(options: Calibrate, folder: Path) -> list[str]:
    if options.text != "library":
        return [read_text(folder / options.text, "text")]
    texts = list(docstrings())
    random.Random(options.seed).shuffle(texts)
    return texts


def read_text(path: Path, option: str) -> str:
    """A UTF-8 file named in the recipe."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"calibrate: {option}: {path}: cannot be read as UTF-8 text: {error}") from error


@cache
def docstrings() -> tuple[str, ...]:
    """Docstrings of the standard library's modules, classes and functions, in the order of files and lines.

    The topics that `validate` reads by default are data of `pydoc_data`, no docstrings: the two never overlap.
    """
    docs = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        docs += [text for text in texts if len(text) >= SHORTEST]
    return tuple(docs)


def _generated(options: Calibrate, folder: Path, checkpoint: Checkpoint, model_digest: str, store: Store) -> Windows:
    """What the float model writes after the prompts; written once, batch by batch, then recalled."""
    path = Path(__file__).with_name("prompts.txt") if options.prompts is None else folder / options.prompts
    prompts = [part.strip("\n") for part in read_text(path, "prompts").split("\n---\n")]
    text = digest(
        "generated", model_digest, prompts, [options.window, options.seed],
        source_digest(_generated), versions(("torch", "transformers", "tokenizers")),
    )  # fmt: skip
    key = digest(text, options.windows)
    entry = store.get(key)
    if entry is None:
        from lowbit.pipeline.calibrate.generate import Texts, generate  # torch, which nothing else here needs

        def recall(number: int, write: Callable[[], Texts]) -> Texts:
            return recall_model(store, digest(text, "texts", number), TypeAdapter(Texts), write)[0]

        def write(to: Path) -> dict[str, object]:
            windows = generate(checkpoint, prompts, options.windows, options.window, options.seed, recall)
            np.save(to / "windows.npy", windows)
            return {}

        entry = store.put(key, write)
    return np.asarray(np.load(entry.file("windows.npy")))
