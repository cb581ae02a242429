"""A checkpoint -> its tokenizer and the ids and texts of its special tokens, wherever it says so."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from lowbit.pipeline.checkpoint.files import read_text
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import CheckpointError


def special_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """The texts of the tokens that end and begin a sequence, "" where there are none."""
    config = checkpoint.read_json("tokenizer_config.json")
    return {name: _text(config.get(name)) for name in ("eos_token", "bos_token")}


def stop_ids(checkpoint: Checkpoint) -> list[int]:
    """Ids that end an answer: those of both configurations, and that of the tokenizer's own end."""
    stop = {i for name in ("generation_config.json", "config.json") for i in _ids(checkpoint.read_json(name), "eos_token_id")}
    tokenizer = checkpoint.read_json("tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    ids = {**_vocabulary(tokenizer.get("model", {})), **added}
    if (eos := special_texts(checkpoint)["eos_token"]) in ids:
        stop.add(ids[eos])
    return sorted(stop)


def document_end(checkpoint: Checkpoint) -> list[int]:
    """The id between two documents: the one that config.json ends a text with; none where it has a list of them."""
    end = checkpoint.config.get("eos_token_id")
    return [end] if isinstance(end, int) else []


def begin_id(checkpoint: Checkpoint) -> int:
    """The id that a text begins with: that of config.json (0 counts as none), else the first that ends a text, else 0."""
    config = checkpoint.config
    return next((i for i in [*_ids(config, "bos_token_id"), *_ids(config, "eos_token_id")] if i), 0)


def _ids(config: dict[str, Any], name: str) -> list[int]:
    """Ids that a configuration gives as a number, a list of them, or not at all."""
    value = config.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Ids by text: a mapping, or (Unigram) a list of texts with their scores."""
    vocabulary = model.get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {text: i for i, (text, _) in enumerate(vocabulary)}


def _text(value: Any) -> str:
    return str((value.get("content") if isinstance(value, dict) else value) or "")


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
    except Exception as error:  # the library raises bare Exceptions
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
