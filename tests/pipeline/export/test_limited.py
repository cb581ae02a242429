"""An export in a process with limits gives the same graph; a process that goes beyond its own is stopped with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.export.limited import export_within_limits
from lowbit.pipeline.limits import export_limits, limit_memory, limit_seconds
from lowbit.pipeline.recipe.sections import Export
from lowbit.pipeline.runtime.isolate import isolated


def spin() -> None:
    limit_seconds(1)
    while True:
        pass


def fill() -> str:
    limit_memory(1 << 28)
    try:
        return str(len(bytes(1 << 30)))
    except MemoryError:
        return "refused"


def test_the_graph_is_the_same(tiny: Callable[..., Path], export: Callable[..., Path], tmp_path: Path) -> None:
    isolated(export_within_limits, open_checkpoint(tiny("llama"), "x"), Export(), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == export("llama").read_bytes()


def test_what_goes_beyond_its_limits_is_stopped() -> None:
    with pytest.raises(PipelineError, match="the process for spin took more processor time than it may"):
        isolated(spin)
    assert isolated(fill) == "refused"


def test_limits_grow_with_the_model() -> None:
    assert export_limits(300, 0, 2) < export_limits(20_000, 0, 2)
    assert export_limits(300, 1 << 30, 2)[1] - export_limits(300, 0, 2)[1] == 4 << 30
