"""A checkpoint -> its tokenizer and the ids and texts of its special tokens, wherever it says so."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lowbit.pipeline.checkpoint.files import present_file, read_text
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.limits import MOST_TOKENS, TOKENIZER_BYTES, TOKENIZER_SECONDS
from lowbit.pipeline.processes import run_worker, same_path

WAIT = 60
"""Seconds until a process that uses no processor time is given up; it starts in one."""


def special_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """The texts of the tokens that end and begin a sequence, "" where there are none."""
    config = checkpoint.read_json("tokenizer_config.json")
    return {name: _text(config.get(name)) for name in ("eos_token", "bos_token")}


def stop_ids(checkpoint: Checkpoint) -> list[int]:
    """Ids that end an answer: those of both configurations, and that of the tokenizer's own end."""
    files = ("generation_config.json", "config.json")
    stop = {i for name in files for i in _ids(checkpoint.folder / name, checkpoint.read_json(name), "eos_token_id")}
    tokenizer = checkpoint.read_json("tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    ids = {**_vocabulary(tokenizer.get("model", {})), **added}
    if (eos := special_texts(checkpoint)["eos_token"]) in ids:
        stop.add(ids[eos])
    return sorted(stop)


def document_end(checkpoint: Checkpoint) -> list[int]:
    """The id between two documents: the one that config.json ends a text with; none where it has a list of them."""
    ids = _ids(checkpoint.folder / "config.json", checkpoint.config, "eos_token_id")
    return [] if isinstance(checkpoint.config.get("eos_token_id"), list) else ids


def begin_id(checkpoint: Checkpoint) -> int:
    """The id that a text begins with: that of config.json (0 counts as none), else the first that ends a text, else 0."""
    where = checkpoint.folder / "config.json"
    ids = [i for name in ("bos_token_id", "eos_token_id") for i in _ids(where, checkpoint.config, name)]
    return next((i for i in ids if i), 0)


def _ids(where: Path, config: dict[str, Any], name: str) -> list[int]:
    """Ids that a configuration gives as a number, a list of them, or not at all.

    Raises:
        CheckpointError: they are no numbers of tokens.
    """
    value = config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < MOST_TOKENS for i in ids):
        raise CheckpointError(f"{where}: {name} is {value!r}; expected a token's number, or a list of them.")
    return ids


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Ids by text: a mapping, or (Unigram) a list of texts with their scores."""
    vocabulary = model.get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {text: i for i, (text, _) in enumerate(vocabulary)}


def _text(value: Any) -> str:
    return str((value.get("content") if isinstance(value, dict) else value) or "")


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Load the tokenizer, where there is one, and read a page with it, in a process that has little time and memory.

    Raises:
        CheckpointError: it takes more than that, or the library cannot read it, or a page with it.
    """
    if (file := present_file(checkpoint.folder, "tokenizer.json")) is None:
        return
    where = checkpoint.folder / "tokenizer.json"
    worker = "lowbit.pipeline.checkpoint.tokenizer_worker"
    try:
        done = run_worker("-m", worker, str(file), seconds=WAIT, env=same_path())
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{where}: reads no page of text in {WAIT} s. Fetch the file again.") from None
    if done.returncode < 0:
        limits = f"{TOKENIZER_SECONDS} s or {TOKENIZER_BYTES >> 30} GB"
        raise CheckpointError(f"{where}: takes more than {limits} to read a page of text. Fetch the file again.")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]
        raise CheckpointError(f"{where}: not a tokenizer that the tokenizers library reads: {why}. Fetch the file again.")


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.json, without truncation or padding."""
    path = checkpoint.folder / "tokenizer.json"
    if (text := read_text(checkpoint.folder, path.name)) is None:
        raise CheckpointError(
            f"{checkpoint.folder}: no tokenizer.json, so no text can be read. Save one with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and panics of Rust, which are none
        raise CheckpointError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def known_ids(ids: list[int], checkpoint: Checkpoint) -> list[int]:
    """Token ids, all of them ones that the model has a row for.

    Raises:
        CheckpointError: tokenizer and model do not belong together.
    """
    rows = checkpoint.config.get("vocab_size")
    if isinstance(rows, int) and max(ids, default=0) >= rows:
        raise CheckpointError(
            f"{checkpoint.folder / 'tokenizer.json'}: makes the token {max(ids)}, the model knows {rows}. They do not belong "
            "together."
        )
    return ids
