"""What a checkpoint says of its special tokens and its chat, wherever it says so."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import CheckpointError


def special_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """The texts of the tokens that end and begin a sequence, "" where there are none."""
    config = checkpoint.read_json("tokenizer_config.json")
    return {name: _text(config.get(name)) for name in ("eos_token", "bos_token")}


def stop_ids(checkpoint: Checkpoint) -> list[int]:
    """Ids that end an answer: those of both configurations, and that of the tokenizer's own end."""
    stop: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = checkpoint.read_json(name).get("eos_token_id")
        stop |= set(value if isinstance(value, list) else [] if value is None else [value])
    tokenizer = checkpoint.read_json("tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    ids = {**_vocabulary(tokenizer.get("model", {})), **added}
    if (eos := special_texts(checkpoint)["eos_token"]) in ids:
        stop.add(ids[eos])
    return sorted(stop)


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Ids by text: a mapping, or (Unigram) a list of texts with their scores."""
    vocabulary = model.get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {text: i for i, (text, _) in enumerate(vocabulary)}


def _text(value: Any) -> str:
    return str((value.get("content") if isinstance(value, dict) else value) or "")


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.json, without truncation or padding."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint.folder}: no tokenizer.json, so no text can be read. Save one with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
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
