"""Digests of files and values, and versions of libraries: what keys are made of, beside the source that runs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """SHA-256 over values that JSON can hold, in hex: the key of a step."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions, by package; one that is not installed (an optional engine) is left out."""
    found = {}
    for name in sorted(packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
