"""tokenizer.json -> tokenizer.mtok, the file of MNN's tokenizer (format "430 4", MNN 3.6.1).

Text: `430 4`, then counts and ids of special, stop and prefix tokens. Then, little-endian, normalizer,
pre-tokenizer, model, decoder, added tokens, chat template, eos, flags, bos. Strings are u16 length + UTF-8.
What the format cannot say is refused, not dropped.
"""

from __future__ import annotations

import struct
import unicodedata
from functools import cache
from typing import Any

from lowbit.pipeline.checkpoint.chat_template import chat_template
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import special_texts, stop_ids
from lowbit.pipeline.errors import ConvertError

Json = dict[str, Any]


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
        + _normalizer(tokenizer.get("normalizer"))
        + _pre_tokenizer(tokenizer.get("pre_tokenizer"))
        + _model(tokenizer)
        + _decoder(tokenizer.get("decoder"))
        + _added(tokenizer.get("added_tokens", []))
        + _long(chat_template(checkpoint))
        + _string(eos)
        + _u8(config.get("clean_up_tokenization_spaces") is True)
        + _string(bos)
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
    for part in _flat(tokenizer.get("post_processor"), "processors"):
        if part["type"] != "TemplateProcessing":
            continue
        for piece in part["single"]:
            if "Sequence" in piece:
                break
            ids += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


def _normalizer(part: Json | None) -> bytes:
    match part:
        case None:
            return _u8(0)
        case {"type": "NFC"}:
            return _compositions()
        case {"type": "Prepend", "prepend": str(text)}:
            return _u8(2) + _string(text)
        case {"type": "Replace", "pattern": pattern, "content": str(text)}:
            return _u8(3) + _string(_pattern(pattern, "normalizer")) + _string(text)
        case {"type": "Sequence", "normalizers": list(parts)}:
            return _u8(4) + _u32(len(parts)) + b"".join(map(_normalizer, parts))
        case {"type": "Strip"}:
            return _u8(8) + _u8(part.get("strip_left", True)) + _u8(part.get("strip_right", True))
    raise _unknown("normalizer", part)


def _pre_tokenizer(part: Json | None) -> bytes:
    match part:
        case None:
            return _u8(0)
        case {"type": "ByteLevel"}:
            if part.get("add_prefix_space"):
                raise ConvertError("tokenizer.json: a ByteLevel pre-tokenizer that adds a space is not supported.")
            return _u8(1) + _u8(part.get("use_regex", True))
        case {"type": "Digits"}:
            return _u8(2) + _u8(part.get("individual_digits", False))
        case {"type": "Metaspace"}:
            return _u8(3) + _metaspace(part)
        case {"type": "Split", "pattern": pattern}:
            behaviors = {"Isolated": 0, "Removed": 1, "MergedWithPrevious": 2}
            behavior = part.get("behavior", "Isolated")
            if behavior not in behaviors:
                raise _unknown("pre_tokenizer", part)
            text = _pattern(pattern, None)
            return _u8(4) + _string(text) + _u8(part.get("invert", False)) + _u8(behaviors[behavior])
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return _u8(6) + _u32(len(parts)) + b"".join(map(_pre_tokenizer, parts))
    raise _unknown("pre_tokenizer", part)


def _model(tokenizer: Json) -> bytes:
    model = tokenizer["model"]
    match model.get("type", "BPE"):
        case "BPE":
            return _bpe(model, _maps_bytes_itself(tokenizer))
        case "Unigram":
            return _unigram(model)
    raise ConvertError(f"tokenizer.json: MNN's tokenizer is not handed models of type {model['type']}; BPE and Unigram are.")


def _unigram(model: Json) -> bytes:
    """Pieces sorted by UTF-8 bytes, each with its id and its score, a logarithm as float64."""
    unknown = model.get("unk_id")
    if unknown is None:
        raise ConvertError("tokenizer.json: a Unigram model without unk_id; MNN needs an id for what it does not know.")
    rows = sorted((piece.encode(), i, score) for i, (piece, score) in enumerate(model["vocab"]))
    head = _u8(2) + _u32(len(rows)) + _u32(unknown) + _u8(model.get("byte_fallback", False))
    return head + b"".join(_string(piece.decode()) + struct.pack("<Id", i, score) for piece, i, score in rows)


def _bpe(model: Json, byte_level: bool) -> bytes:
    """Vocabulary sorted by UTF-8 bytes, merges by their two ids."""
    vocab: dict[str, int] = model["vocab"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    merges = sorted((vocab[a], vocab[b], rank) for rank, (a, b) in enumerate(pairs))
    head = _u8(0) + _u32(len(vocab)) + _u8(model.get("byte_fallback", False)) + _u8(byte_level) + _u32(len(merges))
    words = b"".join(_string(word) + _u32(vocab[word]) for word in sorted(vocab, key=str.encode))
    return head + words + b"".join(struct.pack("<III", *merge) for merge in merges)


def _maps_bytes_itself(tokenizer: Json) -> bool:
    """Whether the model must map bytes: the decoder is ByteLevel but no pre-tokenizer does it."""
    before = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    after = _flat(tokenizer.get("decoder"), "decoders")
    return bool(before) and not any(p["type"] == "ByteLevel" for p in before) and any(
        d["type"] == "ByteLevel" for d in after
    )  # fmt: skip


def _decoder(part: Json | None) -> bytes:
    match part:
        case None | {"type": "ByteLevel"}:
            return _u8(0)
        case {"type": "ByteFallback"}:
            return _u8(1)
        case {"type": "Metaspace"}:
            return _u8(2) + _metaspace(part)
        case {"type": "Fuse"}:
            return _u8(4)
        case {"type": "Replace", "pattern": pattern, "content": str(text)}:
            return _u8(5) + _string(_pattern(pattern, "decoder")) + _string(text)
        case {"type": "Strip", "content": str(text)}:
            return _u8(6) + _string(text) + struct.pack("<II", part.get("start", 0), part.get("stop", 0))
        case {"type": "Sequence", "decoders": list(parts)}:
            return _u8(7) + _u32(len(parts)) + b"".join(map(_decoder, parts))
    raise _unknown("decoder", part)


def _added(tokens: list[Json]) -> bytes:
    rows = [
        _u32(t["id"]) + b"".join(_u8(t.get(flag, False)) for flag in ("special", "lstrip", "rstrip")) + _string(t["content"])
        for t in tokens
    ]
    return _u32(len(rows)) + b"".join(rows)


@cache
def _compositions() -> bytes:
    """NFC as a sequence of replacements, longest first.

    MNN's own table maps single code points, cannot compose, and turns joiners into spaces, which breaks emoji.
    """
    pairs: dict[str, str] = {}
    for point in range(0x110000):
        if 0xD800 <= point < 0xE000 or 0xAC00 <= point < 0xD7A4:  # surrogates; Hangul composes by arithmetic
            continue
        char = chr(point)
        parts = unicodedata.decomposition(char)
        if not parts or parts.startswith("<"):
            continue
        composed = unicodedata.normalize("NFC", char)
        if composed != char:  # singletons and exclusions
            pairs[char] = composed
            continue
        pairs[unicodedata.normalize("NFD", char)] = char
        pairs.setdefault("".join(chr(int(part, 16)) for part in parts.split()), char)
    rows = sorted(pairs.items(), key=lambda pair: -len(pair[0]))
    return _u8(4) + _u32(len(rows)) + b"".join(_u8(3) + _string(a) + _string(b) for a, b in rows)


def _metaspace(part: Json) -> bytes:
    prepends = part.get("add_prefix_space", part.get("prepend_scheme", "always") != "never")
    return _string(part.get("replacement", "\u2581")) + _u8(prepends)


def _pattern(pattern: Any, literal_only: str | None) -> str:
    if isinstance(pattern, dict) and literal_only and "Regex" in pattern:
        raise ConvertError(
            f"tokenizer.json: a {literal_only} that replaces by the regex {pattern['Regex']!r} is not supported."
        )
    return pattern if isinstance(pattern, str) else str(pattern.get("Regex", pattern.get("String")))


def _flat(part: Json | None, key: str) -> list[Json]:
    if part is None:
        return []
    return [one for child in part[key] for one in _flat(child, key)] if part["type"] == "Sequence" else [part]


def _unknown(what: str, part: Any) -> ConvertError:
    return ConvertError(f"tokenizer.json: MNN's tokenizer has no {what} {part!r:.200}.")


def _string(text: str) -> bytes:
    data = text.encode()
    if len(data) > 0xFFFF:
        raise ConvertError(f"tokenizer.json: a text of {len(data)} bytes is longer than MNN's 65535: {text[:40]!r}...")
    return struct.pack("<H", len(data)) + data


def _long(text: str) -> bytes:
    data = text.encode()
    return _u32(len(data)) + data


def _u8(value: Any) -> bytes:
    return struct.pack("<B", int(value))


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)
