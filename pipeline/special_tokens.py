"""What a checkpoint says of its special tokens and its chat, wherever it says so."""

from __future__ import annotations

from typing import Any

from pipeline.checkpoint import Checkpoint


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


def chat_template(checkpoint: Checkpoint) -> str:
    """The checkpoint's chat template, from tokenizer_config.json or the file of its own; "" without one."""
    template = checkpoint.read_json("tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):  # several named ones; engines know one
        template = next((one["template"] for one in template if one.get("name") == "default"), "")
    file = checkpoint.folder / "chat_template.jinja"
    return str(template) if template or not file.exists() else file.read_text("utf-8")


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Ids by text: a mapping, or (Unigram) a list of texts with their scores."""
    vocabulary = model.get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {text: i for i, (text, _) in enumerate(vocabulary)}


def _text(value: Any) -> str:
    return str((value.get("content") if isinstance(value, dict) else value) or "")
