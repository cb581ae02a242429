"""Keys of weights: digests of the checkpoint's tensors, and of how each is quantized."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.rotated_weight import TurnedWeight
from lowbit.passes.quant.scaled_weight import ScaledWeight
from lowbit.passes.quant.weights import SlicedWeight, TransposedWeight, Weight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight, stat_signature
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.durable import make_folder, sync
from lowbit.pipeline.store.signature import signature, signed
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Store

LIBRARIES = ("numba", "numpy")


@dataclass(frozen=True)
class SourceDigests:
    """SHA-256 of checkpoint tensors, remembered by file signature so that each is read for it once."""

    store: Store

    def of(self, weight: Weight) -> str:
        """SHA-256 of the bytes of a weight, with its shape and dtype."""
        if isinstance(weight, TransposedWeight):
            return digest("transposed", self.of(weight.source))
        if isinstance(weight, SlicedWeight):
            return digest("rows", self.of(weight.source), weight.start, weight.shape[0])
        if isinstance(weight, ScaledWeight):
            return digest(
                "scaled",
                self.of(weight.source),
                source_digest(ScaledWeight),
                [None if one is None else one.tolist() for one in weight.scales],
            )
        if isinstance(weight, TurnedWeight):
            turns = [None if turn is None else astuple(turn) for turn in (weight.turn_in, weight.turn_out)]
            scale = None if weight.scale is None else self.of(weight.scale)
            return digest("turned", self.of(weight.source), scale, turns, source_digest(TurnedWeight))
        if (known := self.known(weight)) is not None:
            return known
        hashed = HashedWeight(weight)
        for _ in hashed.chunks():
            pass
        return self.remember(hashed)

    def known(self, weight: Weight) -> str | None:
        """The digest if it is known without reading the weight."""
        if isinstance(weight, TransposedWeight):
            inner = self.known(weight.source)
            return digest("transposed", inner) if inner else None
        if isinstance(weight, SlicedWeight):
            inner = self.known(weight.source)
            return digest("rows", inner, weight.start, weight.shape[0]) if inner else None
        if not isinstance(weight, CheckpointWeight) or not (path := self._path(weight)).exists():
            return None
        return _sealed(path)

    def forget(self, weight: Weight) -> None:
        """Let the digests of the tensors that a weight is made of be taken again when they are asked for."""
        if isinstance(weight, CheckpointWeight):
            self._path(weight).unlink(missing_ok=True)
        for source in vars(weight).values():
            if isinstance(source, Weight):
                self.forget(source)

    def _path(self, weight: CheckpointWeight) -> Path:
        place = digest(str(weight.file), stat_signature(weight.file), weight.offset, weight.shape, weight.onnx_dtype)
        return self.store.root / "sources" / place[:2] / place

    def remember(self, read: HashedWeight) -> str:
        """The digest of a weight that was read to its end, kept if it is the checkpoint's."""
        found = read.sha.hexdigest()
        if isinstance(read.source, CheckpointWeight):
            path = self._path(read.source)
            make_folder(path.parent)
            temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
            seal = _seal(path, found)
            temporary.write_text(" ".join(filter(None, (found, seal, signature(seal)))), "ascii")
            sync(temporary)
            temporary.rename(path)
            sync(path.parent)
        return found


def _sealed(path: Path) -> str | None:
    """The digest in a file that `remember` wrote; None if it was cut short, changed or not signed: the weight is read again."""
    found, seal, signed_as, *_ = *path.read_text("ascii", errors="replace").split(" "), "", "", ""
    return found if seal == _seal(path, found) and signed(seal, signed_as) else None


def _seal(path: Path, found: str) -> str:
    return digest("source", path.name, found)


class HashedWeight(Weight):
    """A weight that is hashed while it is read for any purpose; `sha` is complete when `chunks` has ended."""

    def __init__(self, source: Weight) -> None:
        super().__init__(source.shape, source.onnx_dtype)
        self.source = source
        self.sha = hashlib.sha256(json.dumps([source.shape, source.onnx_dtype]).encode())

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The chunks of the source; another thread hashes while the next one is read."""
        with ThreadPoolExecutor(1) as hasher:
            before: Future[None] = hasher.submit(self.sha.update, b"")
            for start, rows in self.source.chunks():
                before.result()
                before = hasher.submit(self.sha.update, np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
                yield start, rows


def weight_key(weight: QuantizedWeight, source: str) -> str:
    """The key of a quantized weight, from the digest of its source: what it is, not what it is called."""
    return digest(
        "quantized weight",
        source,
        *how_quantized(weight),
        source_digest(QuantizedWeight),
        versions(LIBRARIES),
    )


def shards(checkpoint: Checkpoint, sources: SourceDigests) -> dict[str, dict[str, str]]:
    """SHA-256 of every tensor of a checkpoint, by file and name."""
    found: dict[str, dict[str, str]] = {}
    for name, weight in sorted(checkpoint.weights.items()):
        found.setdefault(weight.file.name, {})[name] = sources.of(weight)
    return found


def model_digest(checkpoint: Checkpoint, sources: SourceDigests) -> str:
    """SHA-256 over the configuration and every tensor of a checkpoint, wherever it lies."""
    tensors = {name: sha for shard in shards(checkpoint, sources).values() for name, sha in shard.items()}
    return digest(checkpoint.config, tensors)


def how_quantized(weight: QuantizedWeight) -> tuple[Any, ...]:
    """What keys hold of a weight beside its source: form, method, options, and the code of the method."""
    method = weight.method
    options = [weight.method_name, method.model_dump(mode="json")]
    return list(astuple(weight.form)), options, source_digest(type(method))
