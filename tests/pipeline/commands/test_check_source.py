"""A result is made again from its checkpoint: what came from a store that lies does not pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.commands.check_source import check_from_source
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.store import Store
from tests.running import know_export, run_in_process
from tests.tiny import recipe_text

QUIET = Console(quiet=True)
RTN = "quantize_matmul: {bits: 4, block_size: 32}"


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text(tiny("llama"), RTN, convert="", validate=""), "utf-8")
    return path


def poison(store: Store, exported: Path) -> None:
    """Let the store's exported graph have another epsilon, sealed as if that were right."""
    key, model = exported.parent.name, onnx.load(exported)
    constants = [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    small = [t for t in [*constants, *model.graph.initializer] if onnx.numpy_helper.to_array(t).size == 1]
    epsilons = [t for t in small if 0 < float(onnx.numpy_helper.to_array(t).reshape(-1)[0]) < 1e-3]
    assert epsilons
    for tensor in epsilons:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array((array * 100).astype(array.dtype), tensor.name))
    shutil.rmtree(exported.parent)
    store.put(key, lambda folder: onnx.save(model, folder / exported.name) or {})


def test_an_honest_result_passes(recipe: Path, tmp_path: Path) -> None:
    folder = run_in_process(load_recipe(recipe), tmp_path / "build")
    check_from_source(folder, None, QUIET)


def test_a_graph_that_a_store_made_up_does_not(recipe: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    poison(store, know_export(load_recipe(recipe), store))
    folder = run_in_process(load_recipe(recipe), tmp_path / "build", store)
    check_folder(folder)
    with pytest.raises(PipelineError, match=r"onnx/model\.onnx: not what its recipe makes of the checkpoint\. Other versions"):
        check_from_source(folder, None, QUIET)


def test_another_checkpoint_is_named(recipe: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_in_process(load_recipe(recipe), tmp_path / "build")
    other = tiny("llama", rms_norm_eps=1e-3)
    with pytest.raises(PipelineError, match="was made of another checkpoint than .*its configuration is another"):
        check_from_source(folder, other, QUIET)
