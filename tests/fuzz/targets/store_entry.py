"""entry.json of the store: whoever may write there can seal what they like."""

from __future__ import annotations

import json
from pathlib import Path

from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.store import RECORD, Store
from tests.fuzz.target import Target

KEY = digest("a key")


def prepare(folder: Path) -> Target:
    store = Store(folder)
    home = folder / KEY[:2] / KEY

    def attempt(data: bytes) -> None:
        home.mkdir(parents=True, exist_ok=True)
        (home / "codes").write_bytes(b"12345")
        (home / RECORD).write_bytes(_sealed(data))
        store.get(KEY)

    entry = store.put(KEY, lambda work: {"mse": 0.5, "size": (work / "codes").write_bytes(b"12345")})
    record = json.loads((entry.folder / RECORD).read_text("utf-8"))
    return Target([json.dumps(record).encode(), json.dumps(record | {"files": {}}).encode(), b"[" * 5000], attempt)


def _sealed(data: bytes) -> bytes:
    """A record with the seal that it should have, if it is one at all."""
    try:
        record = json.loads(data)
        record["seal"] = digest({name: value for name, value in record.items() if name not in ("seal", "signature")})
        return json.dumps(record).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data
