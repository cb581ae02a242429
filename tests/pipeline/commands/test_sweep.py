"""Sweeps and comparisons: real runs of a tiny model, here and on a Ray cluster of two nodes."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowbit.passes import trust
from lowbit.pipeline.commands.sweep import Axis, read_axes, run_here, sweep, variants
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.comparison import COLUMNS, comparison_rows, read_results, write_comparison
from lowbit.pipeline.store.shared import SharedStore
from lowbit.pipeline.store.store import Store
from tests.running import know_export
from tests.tiny import recipe_text

QUIET = Console(quiet=True)
SIX = ["passes.quantize_matmul.bits=4,3,2 passes.quantize_matmul.method=rtn,mse"]


@pytest.fixture
def recipe(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> Recipe:
    path = tmp_path / "mine.yaml"
    passes = (
        "narrow_embedding",
        "quantize_matmul: {bits: 8, block_size: 32, include: [lm_head]}",
        "quantize_matmul: {bits: 4}",
    )
    validate = f"validate: {{window: 64, windows: 2, text: {text}, max_kl_divergence: 1.0}}"
    path.write_text(recipe_text(tiny("llama"), *passes, convert="", validate=validate), "utf-8")
    return load_recipe(path)


def manifests(page: Path) -> dict[str, Any]:
    return {file.parent.name: json.loads(file.read_text("utf-8")) for file in page.parent.glob("*/manifest.json")}


def test_six_variants_share_their_steps(recipe: Recipe, tmp_path: Path) -> None:
    page = sweep(recipe, read_axes(SIX), tmp_path / "build", None, QUIET, run_here).page
    made = manifests(page)
    assert set(made) == {f"bits={bits},method={method}" for bits in (4, 3, 2) for method in ("rtn", "mse")}
    steps = [{step["name"]: step for step in one["steps"]} for one in made.values()]
    for name in ("export", "reference"):
        assert sum(not one[name]["cached"] for one in steps) == 1  # made once, recalled five times
    recalled = [next(note for note in one["write onnx"]["notes"] if "recalled" in note) for one in steps]
    assert sum("15 weights quantized" in note for note in recalled) <= 1  # lm_head is the same in all of them
    kl = {name: one["quality"]["onnxruntime"]["kl_divergence"] for name, one in made.items()}
    assert kl["bits=2,method=rtn"] > kl["bits=3,method=rtn"] > kl["bits=4,method=rtn"]
    assert {gate["passed"] for one in made.values() for gate in one["gates"]} == {True, False}  # a missed gate is a result
    text = page.read_text("utf-8")
    assert all(name in text for name in made)
    assert "<svg" in text
    assert "<script" not in text


def test_another_machine_makes_nothing_again(recipe: Recipe, tmp_path: Path) -> None:
    store = partial(SharedStore, url=f"file://{tmp_path / 'shared'}")
    axes = read_axes(["passes.quantize_matmul.bits=4,3"])
    know_export(recipe, store(tmp_path / "one" / ".store"))
    sweep(recipe, axes, tmp_path / "one", None, QUIET, run_here, store(tmp_path / "one" / ".store"))
    page = sweep(recipe, axes, tmp_path / "other", None, QUIET, run_here, store(tmp_path / "other" / ".store")).page
    for manifest in manifests(page).values():
        steps = {step["name"]: step for step in manifest["steps"]}
        # plain codes are made anew in the one pass in which a new machine hashes the weights
        assert {name for name, step in steps.items() if step["cached"]} >= {"export", "reference", "validate"}


def test_one_that_fails_does_not_stop_the_others(recipe: Recipe, tmp_path: Path) -> None:
    axes = read_axes(["model=.,missing", "validate.windows=1"])[1:]  # windows alone: the same model twice
    axes.append(Axis("model.source", ("./gone", recipe.model.source)))
    know_export(recipe, Store(tmp_path / "build" / ".store"))
    page = sweep(recipe, axes, tmp_path / "build", None, QUIET, run_here).page
    assert len(manifests(page)) == 1
    assert "failed: " in page.read_text("utf-8")
    assert "gone" in page.read_text("utf-8")


def test_a_ray_cluster_of_two_nodes_runs_them(recipe: Recipe, tmp_path: Path, cluster: str) -> None:
    from lowbit.pipeline.commands.sweep_ray import run_on

    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    axes = read_axes(["passes.quantize_matmul.bits=4,3 validate.windows=1,100000"])
    axes[1] = Axis("model.source", (recipe.model.source, "./gone"))
    page = sweep(recipe, axes, tmp_path / "build", None, console, run_on(cluster)).page
    assert len(manifests(page)) == 2
    said = console.export_text()
    assert said.count(" done on ") == 2
    assert said.count("failed: ") >= 2


def test_nodes_trust_the_plug_ins_that_are_trusted_here(
    recipe: Recipe, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit.pipeline.commands.sweep_ray import run_on

    code = "from lowbit.passes.methods.rtn import Rtn\n\nclass Coarse(Rtn):\n    pass\n"
    (tmp_path / "plug-ins" / "toys").mkdir(parents=True)
    (tmp_path / "plug-ins" / "toys" / "coarse.py").write_text(code, "utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(trust, "_folders", {})
    trust.trust_folders(tmp_path / "plug-ins")
    axes = [Axis("passes.quantize_matmul.method", ("toys.coarse",))]
    found = sweep(recipe, axes, tmp_path / "build", None, QUIET, run_on(cluster))
    assert found.failures == {}
    assert list(found.results) == ["method=toys.coarse"]
    monkeypatch.setattr(trust, "_folders", {tmp_path / "gone": None})  # it is on none of the nodes
    found = sweep(recipe, axes, tmp_path / "build", None, QUIET, run_on(cluster))
    assert "gone: is no folder" in found.failures["method=toys.coarse"]


@pytest.fixture
def cluster() -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install lowbit[ray]")
    from ray.cluster_utils import Cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "ray_client_server_port": port})
    try:
        made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield f"ray://127.0.0.1:{port}"
    finally:
        ray.shutdown()
        made.shutdown()


def test_what_is_varied_is_found(recipe: Recipe, tmp_path: Path) -> None:
    last = variants(recipe, read_axes(["passes.quantize_matmul.bits=2"]), tmp_path / "a")[0]
    assert [step.options.model_dump().get("bits") for step in last.passes] == [None, 8, 2]
    first = variants(recipe, read_axes(["passes.quantize_matmul[0].bits=4"]), tmp_path / "b")[0]
    assert [step.options.model_dump().get("bits") for step in first.passes] == [None, 4, 4]
    bare = variants(recipe, read_axes(["passes.narrow_embedding.dtype=fp16"]), tmp_path / "c")[0]
    assert bare.passes[0].options.model_dump()["dtype"] == "fp16"
    two = variants(recipe, read_axes(["validate.windows=1,2"]), tmp_path / "d")
    assert [one.name for one in two] == ["windows=1", "windows=2"]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("", "nothing is varied"),
        ("passes.quantize_matmul.bits", "write an option and its values"),
        ("passes.quantize_matmull.bits=3", "the recipe has 0 entries 'quantize_matmull' under passes"),
        ("passes.quantize_matmul[2].bits=3", "the recipe has 2 entries 'quantize_matmul' under passes"),
        ("passes.bits=3", "write passes.<pass>.<option>"),
        ("bits=3", "write passes.<pass>.<option>"),
        ("passes.quantize_matmul.bits=5", "bits is 5; expected 2, 3, 4 or 8"),
        ("passes.quantize_matmul.bitz=3", "Did you mean 'bits'?"),
    ],
)
def test_what_cannot_be_varied_is_said(recipe: Recipe, tmp_path: Path, vary: str, message: str) -> None:
    with pytest.raises((PipelineError, RecipeError)) as caught:
        variants(recipe, read_axes([vary]), tmp_path / "x")
    assert message in str(caught.value)


def test_a_comparison_says_what_it_cannot_know(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no run has finished here"):
        read_results([tmp_path])
    rows = comparison_rows([], {"<b>": "the disk is full"})
    assert [len(row) for row in rows] == [len(COLUMNS)]
    write_comparison(tmp_path / "page.html", [], rows)
    assert "&lt;b&gt;" in (tmp_path / "page.html").read_text("utf-8")
