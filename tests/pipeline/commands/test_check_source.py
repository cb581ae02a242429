"""A result is made again from its checkpoint: what came from a store that lies does not pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.commands.check_source import check_from_source
from lowbit.pipeline.errors import CheckpointError, PipelineError, ValidationFailed
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.run import prepare
from lowbit.pipeline.store.store import Store
from tests.pipeline.commands.test_check import content, reseal
from tests.running import know_export, run_in_process
from tests.tiny import recipe_text

QUIET = Console(quiet=True)
RTN = "quantize_matmul: {bits: 4, block_size: 32}"


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text(tiny("llama"), RTN, convert="", validate=""), "utf-8")
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export in this process, which has imported torch already."""
    monkeypatch.setattr(prepare, "isolated", lambda _, checkpoint, options, file: export_graph(checkpoint, options, file))


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


@pytest.mark.usefixtures("here")
def test_an_honest_result_passes(recipe: Path, tmp_path: Path) -> None:
    """Whether or not it missed a gate: figures are not what is compared."""
    gate = "validate: {window: 32, windows: 5, max_kl_divergence: 1.0e-9}"
    recipe.write_text(f"{recipe.read_text('utf-8')}{gate}\n", "utf-8")
    with pytest.raises(ValidationFailed):
        run_in_process(load_recipe(recipe), tmp_path / "build")
    lowbit.check(tmp_path / "build" / "mine", from_source=True, console=QUIET)


@pytest.mark.usefixtures("here")
def test_codes_of_another_checkpoint_do_not(recipe: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Two layers have each other's codes, everything agrees with them, and the manifest names the honest checkpoint."""
    honest = content(run_in_process(load_recipe(recipe), tmp_path / "build"))
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    tensors, names = load_file(model / "model.safetensors"), [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    tensors |= {name: tensors[other] for name, other in zip(names, reversed(names), strict=True)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    folder = run_in_process(load_recipe(recipe), tmp_path / "forged", model=model)
    reseal(folder, content(folder) | {"model": honest["model"]})
    check_folder(folder)
    said = r"model\.onnx\.data: .* \(the codes of model\.layers\.0\.self_attn\.q_proj are others\)\. Another version of lowbit"
    with pytest.raises(PipelineError, match=said):
        check_from_source(folder, None, QUIET)


@pytest.mark.usefixtures("here")
def test_the_checkpoint_is_taken_from_where_it_was(recipe: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama", rms_norm_eps=1e-3), tmp_path / "model")
    folder = run_in_process(load_recipe(recipe), tmp_path / "build", model=model)
    check_from_source(folder, None, QUIET)
    moved = model.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError) as error:
        check_from_source(folder, None, QUIET)
    assert error.value.__notes__ == [f"{folder} was made of it: name the folder where it is now with --model."]
    check_from_source(folder, moved, QUIET)


def test_a_graph_that_a_store_made_up_does_not(recipe: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    poison(store, know_export(load_recipe(recipe), store))
    folder = run_in_process(load_recipe(recipe), tmp_path / "build", store)
    check_folder(folder)
    with pytest.raises(
        PipelineError, match=r"onnx/model\.onnx: not what its recipe makes of the checkpoint \(its .* is another\)"
    ):
        check_from_source(folder, None, QUIET)


def test_another_checkpoint_is_named(recipe: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_in_process(load_recipe(recipe), tmp_path / "build")
    other = tiny("llama", rms_norm_eps=1e-3)
    with pytest.raises(PipelineError, match="was made of another checkpoint than .*its configuration is another"):
        check_from_source(folder, other, QUIET)
