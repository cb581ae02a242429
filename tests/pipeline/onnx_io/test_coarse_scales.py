"""A layer whose weights are too small for the dtype of its scales is said, with what would hold it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.pipeline.recipe.load import load_recipe
from tests.running import run_in_process
from tests.tiny import recipe_text

LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("factor", "dtype", "bits", "said", "lost"),
    [
        (1.0, "fp16", 4, None, 0.1),
        (1e-7, "fp16", 4, "100% of its scales are smaller than fp16 holds in full (6.1e-05)", 0.5),
        (1e-38, "fp16", 2, "100% of its scales are smaller than fp16 holds in full (6.1e-05)", 0.99),
        (1e-7, "fp32", 4, None, 0.1),
        (1e-38, "fp32", 4, "100% of its scales are smaller than fp32 holds in full (1.2e-38)", 0.0),
    ],
)
def test_what_is_lost_is_said(
    tiny: Callable[..., Path], tmp_path: Path, factor: float, dtype: str, bits: int, said: str | None, lost: float
) -> None:
    model = shutil.copytree(tiny("llama", dtype="float32", num_hidden_layers=1), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"] * torch.tensor(factor)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    path = tmp_path / "mine.yaml"
    quantize = f"quantize_matmul: {{bits: {bits}, block_size: 32, scale_dtype: {dtype}}}"
    path.write_text(recipe_text(model, quantize, convert="", validate=""), "utf-8")
    manifest = json.loads((run_in_process(load_recipe(path), tmp_path / "build") / "manifest.json").read_text("utf-8"))
    notes = [note for step in manifest["steps"] for note in step["notes"] if "of its scales" in note]
    error = manifest["weights"][LAYER]["relative_error"]
    if said is None:
        assert not notes
        assert error < lost
    else:
        assert notes == [note for note in notes if note.startswith(f"{LAYER}: {said}; its relative error is {error:.2f}.")]
        assert len(notes) == 1
        assert error > lost
