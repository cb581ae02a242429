"""The words of tokenizer.mtok, little-endian, and what all parts of tokenizer.json have in common."""

from __future__ import annotations

import struct
from typing import Any

from lowbit.pipeline.errors import ConvertError

Json = dict[str, Any]


def string(text: str) -> bytes:
    """A text of at most 65535 bytes.

    Raises:
        ConvertError: it is longer.
    """
    data = text.encode()
    if len(data) > 0xFFFF:
        raise ConvertError(f"tokenizer.json: a text of {len(data)} bytes is longer than MNN's 65535: {text[:40]!r}...")
    return struct.pack("<H", len(data)) + data


def long(text: str) -> bytes:
    """A text of any length."""
    data = text.encode()
    return u32(len(data)) + data


def u8(value: Any) -> bytes:
    """A flag, or a small number."""
    return struct.pack("<B", int(value))


def u32(value: int) -> bytes:
    """A count or an id."""
    return struct.pack("<I", value)


def flat(part: Json | None, key: str) -> list[Json]:
    """A part, or the parts of a sequence, which stand under `key`, sequences within it included."""
    if part is None:
        return []
    return [leaf for child in part[key] for leaf in flat(child, key)] if part["type"] == "Sequence" else [part]


def unknown(what: str, part: Any) -> ConvertError:
    """The refusal of a part that MNN has no word for."""
    return ConvertError(f"tokenizer.json: MNN's tokenizer has no {what} {part!r:.200}.")
