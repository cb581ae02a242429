"""What onnx and onnxruntime cannot stand of a stranger's file happens in a process of its own, and is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.pipeline.checkpoint.onnx_model import disk_bytes, open_onnx
from lowbit.pipeline.errors import CheckpointError
from tests.hostile.corpus import onnx_model

CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
GREEDY = """
class SessionOptions: pass
def InferenceSession(*given, **more): bytearray(1 << 38)
"""
ENDLESS = "from lowbit.pipeline.limits import limit_seconds\nlimit_seconds(0)\nwhile True: pass"


def test_a_good_file_is_opened(tmp_path: Path) -> None:
    assert set(open_onnx(onnx_model(tmp_path / "model"), "own.onnx").weights) == {"a_weight"}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (CRASH, r"crashes onnx or onnxruntime \(SIGSEGV\)"),
        (ENDLESS, "takes more than 120 s of processor time"),
        (GREEDY, "takes more than 4 GB of memory"),
    ],
)
def test_a_library_that_crashes_never_ends_or_takes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=f"own.onnx: {why}.* Export it anew"):
        open_onnx(onnx_model(tmp_path / "model"), "own.onnx")


def test_holes_are_no_bytes_on_the_disk(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as stream:
        stream.write(b"x" * 10_000)
        stream.truncate(1 << 40)
    assert 10_000 <= disk_bytes(tmp_path) < 1 << 20
