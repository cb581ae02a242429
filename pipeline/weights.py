"""Quantized weights through the store: each is computed once, one at a time, and recalled ever after."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from passes._quantized import QuantizedWeight
from passes._weights import TransposedWeight, Weight
from pipeline.checkpoint import CheckpointWeight, stat_signature
from pipeline.store import Entry, Store, digest, source_digest, versions

LIBRARIES = ("numba", "numpy")
UNFINISHED = 16
"""Written weights that may wait to be synced: they are on the disk's way already and take no memory here."""


@dataclass
class SourceDigests:
    """SHA-256 of checkpoint tensors, remembered by file signature so that each is read for it once."""

    store: Store

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def of(self, weight: Weight) -> str:
        """SHA-256 of the bytes of a weight, with its shape and dtype."""
        if isinstance(weight, TransposedWeight):
            return digest("transposed", self.of(weight.source))
        if (known := self.known(weight)) is not None:
            return known
        found = hashlib.sha256(json.dumps([weight.shape, weight.onnx_dtype]).encode())
        for _, rows in weight.chunks():
            found.update(rows.tobytes())
        if isinstance(weight, CheckpointWeight):
            self._remember(weight, found.hexdigest())
        return found.hexdigest()

    def known(self, weight: Weight) -> str | None:
        """The digest if it is known without reading the weight."""
        if isinstance(weight, TransposedWeight):
            inner = self.known(weight.source)
            return digest("transposed", inner) if inner else None
        if not isinstance(weight, CheckpointWeight) or not (path := self._path(weight)).exists():
            return None
        return path.read_text("ascii")

    def _path(self, weight: CheckpointWeight) -> Path:
        place = digest(str(weight.file), stat_signature(weight.file), weight.offset, weight.shape, weight.onnx_dtype)
        return self.store.root / "sources" / place[:2] / place

    def _remember(self, weight: CheckpointWeight, found: str) -> None:
        path = self._path(weight)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{threading.get_ident()}.tmp")
        temporary.write_text(found, "ascii")
        temporary.rename(path)


def weight_key(weight: QuantizedWeight, source: str) -> str:
    """The key of a quantized weight, from the digest of its source: what it is, not what it is called."""
    form = weight.form
    return digest(
        "quantized weight",
        source,
        [form.bits, form.block_size, form.symmetric, form.scale_dtype],
        [weight.method_name, weight.method.model_dump(mode="json")],
        source_digest(type(weight.method).__module__),
        source_digest("passes._quantized"),
        versions(LIBRARIES),
    )


def quantize_all(
    weights: list[QuantizedWeight], sources: SourceDigests, store: Store
) -> Iterator[tuple[QuantizedWeight, Future[Entry], bool]]:
    """Each weight with its entry, made or recalled, and whether it was there already.

    While one is quantized, the next is read and hashed and the one before is hashed, synced and renamed: the disk and
    both cores work, and two weights at most are in memory. Files of an entry: `codes`, `scales`, `zero_points`,
    raw little-endian bytes. Facts: `mse` over all weights.
    """
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
        digests = [ahead.submit(sources.of, weight.source) for weight in weights[:1]]
        unfinished: deque[Future[Entry]] = deque()
        for number, weight in enumerate(weights):
            digests += [ahead.submit(sources.of, following.source) for following in weights[number + 1 : number + 2]]
            for following in weights[number + 2 : number + 4]:
                if isinstance(following.source, CheckpointWeight):
                    following.source.prefetch()
            key = weight_key(weight, digests[number].result())
            found = store.get(key)
            future: Future[Entry] = Future()
            if found is None:
                future = behind.submit(store.finish, store.begin(key, partial(_write, weight)))
            else:
                future.set_result(found)
            unfinished.append(future)
            if len(unfinished) > UNFINISHED:
                unfinished.popleft().result()
            yield weight, future, found is not None


def _write(weight: QuantizedWeight, folder: Path) -> dict[str, Any]:
    total = 0.0
    files = {name: (folder / name).open("wb") for name in weight.parts}
    try:
        for chunk in weight.chunks():
            for name, stream in files.items():
                stream.write(memoryview(getattr(chunk, name)).cast("B"))
            total += chunk.squared_error
    finally:
        for stream in files.values():
            stream.close()
    n, k = weight.source.shape
    return {"mse": total / (n * k)}
