"""Digests of files, values, sources and library versions: what keys are made of."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable
from functools import cache
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


@cache
def source_digest(module: str) -> str:
    """Digest of the source of a module and of all modules of this project that it imports."""
    seen: dict[str, str] = {}
    _collect(module, seen)
    return digest(seen)


def _collect(module: str, seen: dict[str, str]) -> None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # `from package import name` where package is a module: name is not one
        return
    if module in seen or spec is None or spec.origin is None:
        return
    text = Path(spec.origin).read_text("utf-8")
    seen[module] = hashlib.sha256(text.encode()).hexdigest()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        for name in found:
            if name.partition(".")[0] == "lowbit":
                _collect(name, seen)
