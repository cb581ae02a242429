"""MNN's converter, called without its wrapper and never trusted by its exit code.

The console script `mnnconvert` and everything under `MNN.tools` install a logging package and report usage;
the extension module `_tools` is the converter alone. It can crash, and it returns 0 when it fails, so it
runs in a process of its own and its output is looked at.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.processes import run_worker

_CALL = 'import sys, _tools; _tools.mnnconvert(["mnnconvert", *sys.argv[1:]])'
_LAST_LINES = 12
SECONDS = 3600
"""The graph of a 7B takes it some; one that has not come by then never will."""


def convert(kind: str, source: Path, target: Path, *options: str) -> str:
    """Convert `source` (of `kind` ONNX, MNN or JSON) to the MNN file `target`; returns the log.

    Raises:
        ConvertError: with the converter's last lines.
    """
    return _run(target, "-f", kind, "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "x", *options)


def read_json(source: Path, scratch: Path) -> dict[str, Any]:
    """An MNN file in the converter's JSON form. Floats in it have about six digits: see `exact_constants`."""
    _run(scratch, "-f", "MNN", "--modelFile", str(source), "--JsonFile", str(scratch))
    return parse_document(scratch.read_bytes(), source)


def parse_document(text: bytes, source: Path) -> dict[str, Any]:
    """The converter's JSON of an MNN file.

    Raises:
        ConvertError: it is none: the names in `source` may be any bytes.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{source}: MNN's converter gives no JSON of it: {error}. Run the recipe again.") from error
    if not isinstance(document, dict):
        raise ConvertError(f"{source}: MNN's converter gives no graph of it. Run the recipe again.")
    return document


def write_json(document: dict[str, Any], target: Path, scratch: Path) -> None:
    """The MNN file of a JSON form; every digit given is kept."""
    scratch.write_text(json.dumps(document), "utf-8")
    convert("JSON", scratch, target)


def _run(target: Path, *arguments: str) -> str:
    target.unlink(missing_ok=True)
    try:
        done = run_worker("-c", _CALL, *arguments, seconds=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ConvertError(f"MNN's converter made no {target.name} in {SECONDS} s and was stopped. Run again.") from error
    log = done.stdout + done.stderr
    if done.returncode or not target.exists() or target.stat().st_size == 0:
        end = "\n".join(log.strip().splitlines()[-_LAST_LINES:])
        raise ConvertError(f"MNN's converter made no {target.name} (status {done.returncode}):\n{end}")
    return log
