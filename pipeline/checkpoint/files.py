"""A name in a model's folder -> a file that may be read: the one place that opens what strangers packed."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.limits import DEEPEST, TEXT_BYTES

TOO_DEEP = f"it is nested more than {DEEPEST} levels deep"


def regular_file(path: Path, most: int | None = None) -> Path:
    """The file itself, links resolved: onnxruntime reads none. It is regular and lies in its folder.

    The Hub's cache links to its blobs (models--x/snapshots/<commit>/file -> models--x/blobs/<hash>); no other link leads out.

    Args:
        most: its largest size in bytes.

    Raises:
        CheckpointError: it is missing, a link that leads out of the folder, no regular file, or larger than `most`.
    """
    try:
        real, folder = path.resolve(strict=True), path.parent.resolve()
        status = real.stat()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"{path}: cannot be opened ({error}). Fetch the checkpoint again.") from error
    if path.is_symlink() and not any(real.is_relative_to(parent) for parent in (folder, folder.parent.parent / "blobs")):
        raise CheckpointError(f"{path}: is a link to {real}, outside the checkpoint. Put the file itself there.")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is no regular file but a folder, a pipe or a device. Put the file itself there.")
    if most is not None and status.st_size > most:
        raise CheckpointError(f"{path}: has {status.st_size:,} bytes, at most {most:,} are read. It is not what it is called.")
    return real


def present_file(folder: Path, name: str) -> Path | None:
    """A file of text in a checkpoint; None where the checkpoint has none of that name.

    Raises:
        CheckpointError: see `regular_file`.
    """
    path = folder / name
    return regular_file(path, TEXT_BYTES) if path.exists() or path.is_symlink() else None


def read_text(folder: Path, name: str) -> str | None:
    """The text of a file; None where there is none.

    Raises:
        CheckpointError: it may not be read, or is not UTF-8.
    """
    if (file := present_file(folder, name)) is None:
        return None
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / name}: cannot be read as UTF-8 text: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """What JSON says, where all who read it agree: engines and libraries differ on keys that stand there twice.

    Raises:
        ValueError: it is no JSON, repeats a key of an object, or is nested more than DEEPEST deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    level = [value] if isinstance(value, dict | list) else []
    depth = 0
    while level:
        if (depth := depth + 1) > DEEPEST:
            raise ValueError(TOO_DEEP)
        parts = (part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole))
        level = [part for part in parts if isinstance(part, dict | list)]
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in value if names.count(name) > 1)!r} stands twice in one object")
    return value


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object; {} where there is no such file.

    Raises:
        CheckpointError: it may not be read, or holds something else.
    """
    if (text := read_text(folder, name)) is None:
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{folder / name}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: holds a {type(value).__name__}, expected a JSON object.")
    return value
