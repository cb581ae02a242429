"""A pass and an engine from outside the package, each one module: everything that the package does, it does with them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lowbit.passes.base import PassError
from lowbit.pipeline.commands.chat import open_chat
from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.commands.plan import make_plan, plan_tables
from lowbit.pipeline.errors import ConvertError, PipelineError, RecipeError
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from tests.plugins import quantize_by_inputs
from tests.plugins.npz_engine import WEIGHTS, Npz
from tests.running import run_in_process
from tests.tiny import recipe_text

PASSES = ("quantize_matmul: {bits: 3, block_size: 32}",)
ENGINE = "tests.plugins.npz_engine"


def recipe_of(folder: Path, model: Path, *passes: str, **sections: str) -> Recipe:
    path = folder / "mine.yaml"
    path.write_text(recipe_text(model, *passes, **sections), "utf-8")
    return load_recipe(path)


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], results: Callable[..., Path]) -> Path:
    """A result of the toy engine."""
    return results(*PASSES, convert=f"convert: {{target: {ENGINE}}}")


def test_an_engine_from_outside_is_planned(tiny: Callable[..., Path], made: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe_of(tmp_path, tiny(), *PASSES, convert=f"convert: {{target: {ENGINE}}}"), tmp_path, None)
    assert plan.hand_off_bytes == {ENGINE: pytest.approx((made / "npz" / WEIGHTS).stat().st_size, rel=0.05)}
    console = Console(file=io.StringIO(), width=200)
    for table in plan_tables(plan):
        console.print(table)
    assert f"{ENGINE} folder" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_engine_from_outside_is_run_and_reported(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text("utf-8"))
    hand_off, figures = manifest["hand_offs"]["npz"], manifest["quality"]["npz"]
    assert (hand_off["target"], hand_off["options"]) == (ENGINE, {"compare": "full", "compressed": False})
    assert hand_off["lowering_relative_error"] == 0
    assert hand_off["max_relative_error"] == 0, "onnxruntime beside onnxruntime"
    assert (figures["exact"]["greedy_equal"], figures["tokenizer"]["equal"]) == (32, figures["tokenizer"]["texts"])
    assert figures["as_stored"]["relative_error"] > 0
    assert manifest["versions"]["numpy"] == np.__version__
    assert "MNN" not in manifest["versions"], "no engine of this result"
    page, card = ((made / name).read_text("utf-8") for name in ("report.html", "README.md"))
    for text in ("NumPy, float arithmetic", "NumPy, as stored", "NumPy codes"):
        assert text in page
    assert Npz.usage in card


def test_an_engine_from_outside_is_checked(made: Path, tmp_path: Path) -> None:
    checked = check_folder(made)
    assert checked["weights"] == Npz.prove(made / "onnx" / "model.onnx", made / "npz", tmp_path).weights_checked > 0
    with np.load(made / "npz" / WEIGHTS) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    codes = next(name for name in content if name.endswith(".codes"))
    content[codes] = content[codes] ^ np.uint8(1)
    np.savez(tmp_path / WEIGHTS, allow_pickle=False, **content)
    with pytest.raises(ConvertError, match=f"'{codes}' differs in"):
        Npz.prove(made / "onnx" / "model.onnx", tmp_path, tmp_path)
    folder = shutil.copytree(made, tmp_path / "result")
    shutil.copyfile(tmp_path / WEIGHTS, folder / "npz" / WEIGHTS)
    with pytest.raises(PipelineError, match=rf"changed since the run \('{codes}' differs in .*\). Run the recipe again"):
        check_folder(folder)


def test_an_engine_from_outside_is_talked_to(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.pipeline.commands.chat.LONGEST", 12)
    toy, plain = ("".join(open_chat(made, runtime).ask("The list")) for runtime in (None, "onnx"))
    assert toy == plain != ""


def test_what_an_engine_from_outside_made_is_replaced(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def run(**sections: str) -> Path:
        return run_in_process(recipe_of(tmp_path, tiny(), *PASSES, **sections), tmp_path / "build")

    assert (run(convert=f"convert: {{target: {ENGINE}, compressed: true}}") / "npz" / WEIGHTS).exists()
    assert not (run(convert="") / "npz").exists()


def test_an_engine_from_outside_refuses(tiny: Callable[..., Path], tmp_path: Path) -> None:
    convert = f"convert: {{target: {ENGINE}, scale_dtype: fp32}}"
    with pytest.raises(
        RecipeError, match=r"'scale_dtype'. It is an option of target: mnn-llm and mnn; this target has compare, compressed"
    ):
        recipe_of(tmp_path, tiny(), *PASSES, convert=convert)
    with pytest.raises(RecipeError, match="compressed is 3; expected"):
        recipe_of(tmp_path, tiny(), *PASSES, convert=f"convert: {{target: {ENGINE}, compressed: 3}}")
    embedded = ("quantize_embedding: {bits: 4, block_size: 32}", *PASSES)
    recipe = recipe_of(tmp_path, tiny(), *embedded, convert=f"convert: {{target: {ENGINE}}}")
    with pytest.raises(PassError, match="the toy engine looks no quantized embedding up"):
        run_in_process(recipe, tmp_path / "build")


def test_a_result_of_an_engine_that_is_gone_says_so(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "result")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text("utf-8").replace(f'"target": "{ENGINE}"', '"target": "no.such.engine"'), "utf-8")
    with pytest.raises(PipelineError, match=r"there is no target module 'no.such.engine'"):
        open_chat(folder, None)
    with pytest.raises(PipelineError, match=r"there is no target module 'no.such.engine'"):
        check_folder(folder)


def test_a_pass_from_outside_that_looks_at_inputs(
    results: Callable[..., Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    name = quantize_by_inputs.__name__  # imported here, so trusted
    with pytest.raises(RecipeError, match=f"{name} looks at the inputs of layers here; say which text"):
        recipe_of(tmp_path, tiny(), name)
    calibrate = "calibrate: {windows: 4, window: 32}"
    plan = make_plan(recipe_of(tmp_path, tiny(), name, convert=calibrate), tmp_path, None)
    assert {weight.weight.made_by for weight in plan.weights} == {name}

    def weights(*passes: str) -> dict[str, str]:
        folder = results(*passes, convert=calibrate)
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        assert "calibrate" in [step["name"] for step in manifest["steps"]]
        return {name: weight["codes_sha256"] for name, weight in manifest["weights"].items()}

    assert weights(name) == weights("quantize_matmul: {bits: 4, block_size: 32, method: weighted_mse}")
