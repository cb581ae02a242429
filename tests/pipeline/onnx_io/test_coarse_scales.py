"""A layer whose weights are too small for the dtype of its scales is said, with what would hold it."""

from __future__ import annotations

import html
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lowbit.passes.quant.format import BlockFormat, ScaleDtype
from lowbit.pipeline.onnx_io.coarse_scales import DTYPES, share_below, smallest_held
from lowbit.pipeline.recipe.load import load_recipe
from tests.running import run_in_process
from tests.tiny import recipe_text

LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("factor", "dtype", "bits", "said", "lost"),
    [
        (1.0, "fp16", 4, None, 0.1),
        (1e-4, "fp16", 4, None, 0.1),
        (1e-7, "fp16", 4, "100% of its scales are smaller than fp16 holds for 4 bits (9.5e-07)", 0.5),
        (1e-7, "fp16", 2, "100% of its scales are smaller than fp16 holds for 2 bits (2.4e-07)", 0.5),
        (1e-38, "fp16", 4, "100% of its scales are smaller than fp16 holds for 4 bits (9.5e-07)", 0.99),
        (1e-38, "fp16", 2, "100% of its scales are smaller than fp16 holds for 2 bits (2.4e-07)", 0.99),
        (1e-7, "fp32", 4, None, 0.1),
        (1e-38, "fp32", 4, "100% of its scales are smaller than fp32 holds for 4 bits (1.2e-38)", 0.0),
    ],
)
def test_what_is_lost_is_said(
    tiny: Callable[..., Path], tmp_path: Path, factor: float, dtype: str, bits: int, said: str | None, lost: float
) -> None:
    model = shutil.copytree(tiny("llama", dtype="float32", num_hidden_layers=1), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"] * torch.tensor(factor)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    path, printed = tmp_path / "mine.yaml", io.StringIO()
    quantize = f"quantize_matmul: {{bits: {bits}, block_size: 32, scale_dtype: {dtype}}}"
    path.write_text(recipe_text(model, quantize, convert="", validate=""), "utf-8")
    console = Console(file=printed, width=400, color_system=None)
    folder = run_in_process(load_recipe(path), tmp_path / "build", console=console)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    notes = [note for step in manifest["steps"] for note in step["notes"] if "of its scales" in note]
    error = manifest["weights"][LAYER]["relative_error"]
    if said is None:
        assert not notes
        assert error < lost
    else:
        assert len(notes) == 1
        assert notes[0].startswith(f"{LAYER}: {said}, so it lost precision; its relative error is {error:.2f}.")
        assert notes[0] in printed.getvalue()
        assert notes[0] in html.unescape((folder / "report.html").read_text("utf-8"))
        assert error > lost


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_scale_below_the_limit_counts(dtype: ScaleDtype) -> None:
    """Of either sign, and none that is the limit itself."""
    limit = smallest_held(BlockFormat(4, 32, True, dtype))
    scales = np.array([limit, -limit, np.nextafter(limit, 1), 0.9 * limit, -0.5 * limit, 1.0, -3.0, 2 * limit], DTYPES[dtype])
    assert share_below(scales, limit) == 2 / 8
