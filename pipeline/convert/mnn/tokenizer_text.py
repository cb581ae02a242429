"""What tokenizer.json does to text before and after its model -> the same parts of tokenizer.mtok."""

from __future__ import annotations

import struct
import unicodedata
from functools import cache
from typing import Any

from lowbit.pipeline.convert.mnn.mtok import Json, string, u8, u32, unknown
from lowbit.pipeline.errors import ConvertError


def normalizer_of(part: Json | None) -> bytes:
    """What is done to a text as a whole."""
    match part:
        case None:
            return u8(0)
        case {"type": "NFC"}:
            return _compositions()
        case {"type": "Prepend", "prepend": str(text)}:
            return u8(2) + string(text)
        case {"type": "Replace", "pattern": pattern, "content": str(text)}:
            return u8(3) + string(_pattern(pattern, "normalizer")) + string(text)
        case {"type": "Sequence", "normalizers": list(parts)}:
            return u8(4) + u32(len(parts)) + b"".join(map(normalizer_of, parts))
        case {"type": "Strip"}:
            return u8(8) + u8(part.get("strip_left", True)) + u8(part.get("strip_right", True))
    raise unknown("normalizer", part)


def pre_tokenizer_of(part: Json | None) -> bytes:
    """How a text is cut before the model sees it."""
    match part:
        case None:
            return u8(0)
        case {"type": "ByteLevel"}:
            if part.get("add_prefix_space"):
                raise ConvertError("tokenizer.json: a ByteLevel pre-tokenizer that adds a space is not supported.")
            return u8(1) + u8(part.get("use_regex", True))
        case {"type": "Digits"}:
            return u8(2) + u8(part.get("individual_digits", False))
        case {"type": "Metaspace"}:
            return u8(3) + _metaspace(part)
        case {"type": "Split", "pattern": pattern}:
            behaviors = {"Isolated": 0, "Removed": 1, "MergedWithPrevious": 2}
            behavior = part.get("behavior", "Isolated")
            if behavior not in behaviors:
                raise unknown("pre_tokenizer", part)
            text = _pattern(pattern, None)
            return u8(4) + string(text) + u8(part.get("invert", False)) + u8(behaviors[behavior])
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return u8(6) + u32(len(parts)) + b"".join(map(pre_tokenizer_of, parts))
    raise unknown("pre_tokenizer", part)


def decoder_of(part: Json | None) -> bytes:
    """How tokens become text again."""
    match part:
        case None | {"type": "ByteLevel"}:
            return u8(0)
        case {"type": "ByteFallback"}:
            return u8(1)
        case {"type": "Metaspace"}:
            return u8(2) + _metaspace(part)
        case {"type": "Fuse"}:
            return u8(4)
        case {"type": "Replace", "pattern": pattern, "content": str(text)}:
            return u8(5) + string(_pattern(pattern, "decoder")) + string(text)
        case {"type": "Strip", "content": str(text)}:
            return u8(6) + string(text) + struct.pack("<II", part.get("start", 0), part.get("stop", 0))
        case {"type": "Sequence", "decoders": list(parts)}:
            return u8(7) + u32(len(parts)) + b"".join(map(decoder_of, parts))
    raise unknown("decoder", part)


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
    return u8(4) + u32(len(rows)) + b"".join(u8(3) + string(a) + string(b) for a, b in rows)


def _metaspace(part: Json) -> bytes:
    prepends = part.get("add_prefix_space", part.get("prepend_scheme", "always") != "never")
    return string(part.get("replacement", "\u2581")) + u8(prepends)


def _pattern(pattern: Any, literal_only: str | None) -> str:
    if isinstance(pattern, dict) and literal_only and "Regex" in pattern:
        raise ConvertError(
            f"tokenizer.json: a {literal_only} that replaces by the regex {pattern['Regex']!r} is not supported."
        )
    return pattern if isinstance(pattern, str) else str(pattern.get("Regex", pattern.get("String")))
