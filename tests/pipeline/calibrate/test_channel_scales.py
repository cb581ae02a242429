"""fold_channel_scales in a run: searched once, recalled after a stop, and both runtimes compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.passes.registry import find_pass
from lowbit.pipeline.calibrate import channel_scales
from lowbit.pipeline.calibrate.channel_scales import find_channel_scales
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests
from tests.conftest import Exported
from tests.running import run_in_process
from tests.tiny import make_checkpoint, recipe_text

IDS = np.random.default_rng(0).integers(1, 300, (6, 16))
QUIET = Console(quiet=True)


def values(exported: Exported, root: Path, bits: int = 2) -> list[bytes]:
    """The scaled weights of a tiny model, after the search."""
    _, graph = exported("qwen2")
    find_pass("quantize_matmul").model_validate_json(f'{{"bits": {bits}, "block_size": 32}}').apply(graph)
    find_pass("fold_channel_scales")().apply(graph)
    store, shares = Store(root), []
    find_channel_scales(graph, IDS, SourceDigests(store), store, lambda done, _: shares.append(done))
    assert shares == sorted(shares)
    return [weight.source.load().tobytes() for _, weight in quantized_matmuls(graph)]


def test_a_stopped_search_goes_on(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, searched = values(exported, tmp_path / "whole"), []
    search_scale = channel_scales.search_scale

    def stops(*arguments: object) -> np.ndarray:
        searched.append(1)
        if len(searched) == 6:
            raise KeyboardInterrupt
        return search_scale(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(channel_scales, "search_scale", stops)
    with pytest.raises(KeyboardInterrupt):
        values(exported, tmp_path / "stopped")
    assert values(exported, tmp_path / "stopped") == whole
    assert len(searched) == 9 + 1, "only the one that was stopped is searched twice"
    assert values(exported, tmp_path / "stopped") == whole
    assert len(searched) == 10
    values(exported, tmp_path / "stopped", bits=3)
    assert len(searched) == 19, "other bits want other scales"


def test_awq_runs_in_both_runtimes(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", attention_bias=True)
    passes = ["narrow_embedding", "quantize_matmul: {bits: 3, block_size: 32, method: awq}", "fold_channel_scales"]
    path = tmp_path / "mine.yaml"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, "utf-8")
    sections = f"calibrate: {{text: {text.name}, windows: 8, window: 32}}\nconvert: {{}}"
    validation = "validate: {window: 64, windows: 2}"
    path.write_text(recipe_text(model, *passes, convert=sections, validate=validation), "utf-8")
    manifests = [
        json.loads((run_in_process(load_recipe(path), tmp_path / "build") / "manifest.json").read_text()) for _ in "12"
    ]
    for manifest in manifests:
        assert manifest["hand_offs"]["mnn"]["bit_exact"] is True
        assert manifest["hand_offs"]["mnn"]["max_relative_error"] < 1e-4
        assert manifest["quality"]["mnn"]["memory_high"]["greedy_equal"] == 32
        assert {weight["method"] for weight in manifest["weights"].values()} == {"awq"}
    step = next(step for step in manifests[1]["steps"] if step["name"] == "channel scales")
    assert (step["cached"], step["notes"]) == (True, ["0 searched, 9 recalled"])
    assert manifests[0]["weights"] == manifests[1]["weights"]
