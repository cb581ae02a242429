"""The frontier of a tiny model, and the times of a small product: real runs, real engines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lowbit.pipeline.commands.frontier import BITS, frontier
from lowbit.pipeline.commands.measure import measure
from lowbit.pipeline.commands.plan import make_plan
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.mixed_precision.device_times import device_times
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.store import Store
from tests.running import know_export
from tests.tiny import recipe_text

QUIET = Console(quiet=True)


def recipe(folder: Path, model: Path, options: str) -> Path:
    path = folder / "mine.yaml"
    validate = "validate: {window: 64, windows: 2, max_kl_divergence: 0.0001}"
    path.write_text(recipe_text(model, "narrow_embedding", options, convert="convert: {}", validate=validate), "utf-8")
    return path


def test_the_frontier_is_predicted_and_measured(tiny: Callable[..., Path], tmp_path: Path) -> None:
    options = "allocate_bits: {bits_per_weight: 4, bits: [2, 3, 4], block_sizes: [64], sensitivity: fisher}"
    mine = load_recipe(recipe(tmp_path, tiny("llama"), options))
    know_export(mine, Store(tmp_path / "build" / ".store"))
    folder = frontier(mine, tmp_path / "build", None, 2, QUIET)
    found = json.loads((folder / "frontier.json").read_text("utf-8"))
    chosen = found["chosen"]
    assert [float(one["name"]) for one in chosen] == [bits for bits in BITS if bits >= 2.6]  # 2 bits and headers
    for before, after in itertools.pairwise(chosen):
        assert before["bytes"] < after["bytes"]
        assert before["predicted"] > after["predicted"]
    assert all(one["bits_per_weight"] <= float(one["name"]) + 1e-9 for one in chosen)
    measured = [one["name"] for one in chosen if one["kl_divergence"] is not None]
    assert measured == [chosen[0]["name"], chosen[-1]["name"]]
    uniform = found["uniform"]
    assert [one["name"] for one in uniform] == ["2/64", "3/64", "4/64"]
    assert uniform[0]["kl_divergence"] > uniform[1]["kl_divergence"] > uniform[2]["kl_divergence"] > 0
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "3/64" in (folder / "frontier.svg").read_text("utf-8")
    assert not [one for one in folder.iterdir() if one.is_dir()]  # what was made to be measured is gone
    assert len(make_plan(mine, tmp_path / "build", None).weights) == 15  # and plan knows now what a run will choose


def test_what_has_no_frontier_is_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="a frontier needs choices: put allocate_bits into passes"):
        frontier(load_recipe(recipe(tmp_path, tiny("llama"), "quantize_matmul: {bits: 4}")), tmp_path, None, 0, QUIET)
    options = "allocate_bits: {bits_per_weight: 9, bits: [8], block_sizes: [64], sensitivity: weight_mse}"
    mine = load_recipe(recipe(tmp_path, tiny("llama"), options))
    know_export(mine, Store(tmp_path / "build" / ".store"))
    with pytest.raises(PipelineError, match=r"make 8\.\d\d to 8\.\d\d bits per weight; a frontier goes from 2\.2 to 4\.5"):
        frontier(mine, tmp_path / "build", None, 0, QUIET)


def test_this_machine_is_measured(tmp_path: Path) -> None:
    paths = measure(tmp_path / "targets", tmp_path / "build", QUIET, (256, 128))
    assert [path.stem for path in paths] == ["mnn-here", "onnxruntime-here"]
    for path in paths:
        times = device_times(path.stem, tmp_path)
        assert times.shape == (256, 128)
        assert all(value > 0 for value in times.relative((2, 3, 4, 8)).values())
