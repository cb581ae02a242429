"""tokenizer.json -> tokenizer.mtok, the file of MNN's tokenizer (format "430 4", MNN 3.6.1).

Text: `430 4`, then counts and ids of special, stop and prefix tokens. Then, little-endian, normalizer,
pre-tokenizer, model, decoder, added tokens, chat template, eos, flags, bos. Strings are u16 length + UTF-8.
What the format cannot say is refused, not dropped.
"""

from __future__ import annotations

from lowbit.pipeline.checkpoint.chat_template import chat_template
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import special_texts, stop_ids
from lowbit.pipeline.convert.mnn.mtok import Json, flat, long, string, u8, u32
from lowbit.pipeline.convert.mnn.tokenizer_model import model_of
from lowbit.pipeline.convert.mnn.tokenizer_text import decoder_of, normalizer_of, pre_tokenizer_of
from lowbit.pipeline.errors import ConvertError


def tokenizer_bytes(checkpoint: Checkpoint) -> bytes:
    """The content of tokenizer.mtok, from the tokenizer, its configuration and the generation configuration.

    Raises:
        ConvertError: no tokenizer.json, or a part of it that MNN's tokenizer does not have.
    """
    tokenizer = checkpoint.read_json("tokenizer.json")
    if not tokenizer:
        raise ConvertError(f"{checkpoint.folder}: no tokenizer.json, so MNN could not read any text.")
    config = checkpoint.read_json("tokenizer_config.json")
    texts = special_texts(checkpoint)
    eos, bos = texts["eos_token"], texts["bos_token"]
    return (
        _ids(checkpoint, tokenizer)
        + normalizer_of(tokenizer.get("normalizer"))
        + pre_tokenizer_of(tokenizer.get("pre_tokenizer"))
        + model_of(tokenizer)
        + decoder_of(tokenizer.get("decoder"))
        + _added(tokenizer.get("added_tokens", []))
        + long(chat_template(checkpoint))
        + string(eos)
        + u8(config.get("clean_up_tokenization_spaces") is True)
        + string(bos)
    )


def _ids(checkpoint: Checkpoint, tokenizer: Json) -> bytes:
    added = tokenizer.get("added_tokens", [])
    special = sorted({token["id"] for token in added if token.get("special")})
    stop = stop_ids(checkpoint)
    prefix = _prefix(tokenizer)
    counts = f"430 4\n{len(special)} {len(stop)} {len(prefix)}\n"
    return (counts + " ".join(map(str, [*special, *stop, *prefix])) + "\n").encode()


def _prefix(tokenizer: Json) -> list[int]:
    """Ids that the tokenizer puts in front of every text: those before the text in its template."""
    ids: list[int] = []
    for part in flat(tokenizer.get("post_processor"), "processors"):
        if part["type"] != "TemplateProcessing":
            continue
        for piece in part["single"]:
            if "Sequence" in piece:
                break
            ids += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


def _added(tokens: list[Json]) -> bytes:
    rows = [
        u32(t["id"]) + b"".join(u8(t.get(flag, False)) for flag in ("special", "lstrip", "rstrip")) + string(t["content"])
        for t in tokens
    ]
    return u32(len(rows)) + b"".join(rows)
