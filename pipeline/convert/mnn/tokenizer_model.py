"""The model of tokenizer.json, BPE or Unigram -> that of tokenizer.mtok."""

from __future__ import annotations

import struct

from lowbit.pipeline.convert.mnn.mtok import Json, flat, string, u8, u32
from lowbit.pipeline.errors import ConvertError


def model_of(tokenizer: Json) -> bytes:
    """The vocabulary and how words are put together.

    Raises:
        ConvertError: MNN has no such model.
    """
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
    head = u8(2) + u32(len(rows)) + u32(unknown) + u8(model.get("byte_fallback", False))
    return head + b"".join(string(piece.decode()) + struct.pack("<Id", i, score) for piece, i, score in rows)


def _bpe(model: Json, byte_level: bool) -> bytes:
    """Vocabulary sorted by UTF-8 bytes, merges by their two ids."""
    vocab: dict[str, int] = model["vocab"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    merges = sorted((vocab[a], vocab[b], rank) for rank, (a, b) in enumerate(pairs))
    head = u8(0) + u32(len(vocab)) + u8(model.get("byte_fallback", False)) + u8(byte_level) + u32(len(merges))
    words = b"".join(string(word) + u32(vocab[word]) for word in sorted(vocab, key=str.encode))
    return head + words + b"".join(struct.pack("<III", *merge) for merge in merges)


def _maps_bytes_itself(tokenizer: Json) -> bool:
    """Whether the model must map bytes: the decoder is ByteLevel but no pre-tokenizer does it."""
    before = flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    after = flat(tokenizer.get("decoder"), "decoders")
    return bool(before) and not any(p["type"] == "ByteLevel" for p in before) and any(
        d["type"] == "ByteLevel" for d in after
    )  # fmt: skip
