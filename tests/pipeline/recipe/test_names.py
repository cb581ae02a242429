"""A result's name is a safe file name: nothing beside build/ is touched, whatever a recipe is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lowbit.pipeline.__main__ import main
from lowbit.pipeline.commands.recipes import Recipe, name_of
from lowbit.pipeline.commands.sweep import read_axes, run_here, sweep
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.recipe.edit import variant
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.report.result import compare_results
from lowbit.pipeline.run.runner import run_recipe
from tests.tiny import recipe_text

BAD = [
    "..", ".", "...", ".store", "-rf", "~root", "a\nb", "a\x1b[31m", "a\u202eb", " a", "a ", "a\\b", "x" * 101,
    "\U0001f600" * 60, "sweep", "Frontier", "compare.html",
]  # fmt: skip
"""Names of files; `BUILT` are possible in Python alone."""
BUILT = ["a/b", "/tmp/a", "../../a", "a\0b", "\udc80"]
QUIET = Console(quiet=True)


@pytest.fixture
def surroundings(tmp_path: Path) -> Path:
    """A folder with things that a run might delete or overwrite."""
    for name in ("onnx", "mnn", "genai"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("kept", "utf-8")
    for name in ("manifest.json", "report.html", "recipe.yaml"):
        (tmp_path / name).write_text("kept", "utf-8")
    return tmp_path


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_file_of_a_bad_name_is_refused_and_nothing_is_touched(
    tiny: Callable[..., Path], surroundings: Path, name: str
) -> None:
    file = surroundings / "recipes" / f"{name}.yaml"
    file.parent.mkdir()
    file.write_text(recipe_text(tiny("llama"), "narrow_embedding"), "utf-8")
    before = content(surroundings)
    with pytest.raises(RecipeError, match="cannot be the name of a result.*Call the recipe by letters"):
        run_recipe(load_recipe(file), surroundings / "build", None, QUIET)
    assert content(surroundings) == before
    assert not (surroundings / "build").exists()


@pytest.mark.parametrize("name", [*BAD, *BUILT], ids=ascii)
def test_so_is_a_name_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="cannot be the name of a result"):
        Recipe("./x", ["narrow_embedding"], name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["demo-q3", "3.2", "bits=4,method=mse", "x" * 100, "modèle 模型", "a..b", "sweeps"])
def test_good_names_are_taken(name: str) -> None:
    assert Recipe("./x", ["narrow_embedding"], name=name).name == name


def test_a_name_made_of_a_models_is_good() -> None:
    assert name_of("/x/.Models") == "models"
    assert name_of("/x/..bin.onnx") == "bin"


def test_variants_are_named_as_well_before_they_are_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe_text(tiny("llama"), "quantize_matmul: {bits: 4}"), "utf-8")
    recipe = load_recipe(file)
    with pytest.raises(RecipeError, match="cannot be the name of a result"):
        variant(recipe, tmp_path / "there" / "..yaml", lambda _: None)
    assert not (tmp_path / "there").exists()
    long = [f"validate.text={'x' * 120}"]
    with pytest.raises(RecipeError, match="it has 125 characters"):
        sweep(recipe, read_axes(long), tmp_path / "build", None, QUIET, run_here)
    twins = ["validate.text=a?b,a*b"]
    with pytest.raises(PipelineError, match="two combinations would be called text=a_b"):
        sweep(recipe, read_axes(twins), tmp_path / "build", None, QUIET, run_here)


def test_places_that_are_files_or_folders(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a folder is wanted there is a file, or the other way round."""
    (tmp_path / "file").write_text("kept", "utf-8")
    with pytest.raises(PipelineError, match="cannot write here"):
        compare_results([finished], tmp_path)
    with pytest.raises(PipelineError, match="cannot write here"):
        compare_results([finished], tmp_path / "file" / "page.html")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: ./nowhere\npasses: [narrow_embedding]\n", "utf-8")
    vary = ("--vary", "export.opset=18,20")
    for words in (("run", recipe), ("plan", recipe), ("sweep", recipe, *vary), ("measure",)):
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, words), "--build", str(tmp_path / "file")])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert str(tmp_path) in "".join(capsys.readouterr())
    assert (tmp_path / "file").read_text("utf-8") == "kept"
    with pytest.raises(PipelineError, match="is a folder"):
        Recipe("./x", ["narrow_embedding"]).save_new(tmp_path)
