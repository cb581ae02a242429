"""`import lowbit`, as scripts, notebooks and other programs use it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import lowbit
from lowbit.passes import NarrowEmbedding, QuantizeMatmul
from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.store.store import Store
from tests.conftest import PYDOCS
from tests.tiny import recipe_text

QUIET = Console(quiet=True)
SHORT: dict[str, Any] = {"windows": 2, "window": 64}


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(code, "utf-8")
    return subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=False)


def hashes(result: lowbit.Result) -> dict[str, str]:
    """Of the models, whose bytes do not depend on the clock."""
    return {name: sha for name, sha in result.manifest.files.items() if name.startswith(("onnx/", "mnn/"))}


def test_importing_it_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import lowbit; print(*sorted({m.partition('.')[0] for m in sys.modules} - "
    code += "{m.partition('.')[0] for m in before} - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lowbit"]


def test_it_offers_what_it_names() -> None:
    assert set(dir(lowbit)) == {*lowbit.__all__, "__version__"}
    assert all(getattr(lowbit, name) is not None for name in dir(lowbit))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        lowbit.quantise  # noqa: B018
    from lowbit import passes

    assert passes.QuantizeMatmul.__name__ == "QuantizeMatmul"
    with pytest.raises(AttributeError, match="no attribute 'QuantizeMatmuls'"):
        passes.QuantizeMatmuls  # noqa: B018


def test_a_recipe_from_python_is_the_recipe_from_yaml(
    tiny: Callable[..., Path], tmp_path: Path, export: Callable[..., Path]
) -> None:
    """Built, saved and read again, or written by hand: the same keys, the same bytes."""
    model = tiny("llama")
    passes = [
        NarrowEmbedding(),
        {"quantize_matmul": {"bits": 8, "block_size": 32, "include": ["lm_head"]}},
        QuantizeMatmul(bits=3, block_size=32, method="mse"),
    ]
    built = lowbit.Recipe(model, passes, validate=Validate(**SHORT), convert="mnn-llm", name="mine")
    saved = lowbit.load_recipe(built.save(tmp_path / "saved.yaml"))
    written = tmp_path / "written.yaml"
    entries = (
        "narrow_embedding",
        "quantize_matmul: {bits: 8, block_size: 32, include: [lm_head]}",
        "quantize_matmul: {bits: 3, block_size: 32, method: mse}",
    )
    written.write_text(recipe_text(model, *entries, validate=f"validate: {json.dumps(SHORT)}"), "utf-8")
    export("llama", Store(tmp_path / "build" / ".store"))
    first = built.run(tmp_path / "build", console=QUIET)
    assert first.name == "mine"
    for recipe in (saved, lowbit.load_recipe(written)):
        export("llama", Store(tmp_path / recipe.name))
        fresh = recipe.run(tmp_path / "fresh", store=str(tmp_path / recipe.name), console=QUIET)
        assert hashes(fresh) == hashes(first)
        assert [step.key for step in fresh.manifest.steps] == [step.key for step in first.manifest.steps]
        again = recipe.run(tmp_path / "build", console=QUIET)
        assert {step.name for step in again.manifest.steps if step.cached} >= {"export", "write onnx", "validate"}


def test_a_saved_recipe_means_the_same_elsewhere(tmp_path: Path) -> None:
    moved = lowbit.load_recipe(lowbit.load_recipe("demo-reasoner-q2").save(tmp_path / "mine.yaml"))
    assert Path(moved.model).samefile(PYDOCS.with_name("llama-reasoner"))
    assert moved.plan(tmp_path).bits_per_weight == pytest.approx(lowbit.plan("demo-reasoner-q2", tmp_path).bits_per_weight)
    for path in (moved.checked.calibrate.prompts, moved.checked.validate.text):  # type: ignore[union-attr]
        assert Path(str(path)).is_absolute()
    timed = lowbit.load_recipe("demo-fast-q3").save(tmp_path / "fast.yaml").read_text("utf-8")
    assert str(PYDOCS.parents[2] / "recipes" / "targets" / "snapdragon-8-elite.yaml") in timed


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"passes": [{"quantize_matmul": {"bits": 5}}]}, "passes[0].quantize_matmul.bits: bits is 5; expected 2, 3, 4 or 8."),
        ({"passes": ["quantize_matmull"]}, "passes[0]: there is no pass 'quantize_matmull'. Did you mean 'quantize_matmul'?"),
        ({"passes": [{"quantize_matmul": {"bitz": 3}}]}, "passes[0].quantize_matmul.bitz: unknown option 'bitz'. Did you mean"),
        ({"passes": [QuantizeMatmul(bits=3, method="gptq")]}, "passes[0]: quantize_matmul looks at the inputs of layers here;"),
        ({"validate": {"window": 1}}, "validate.window: window is 1; expected greater than or equal to 2."),
        ({"convert": ["mnn-llm", "mnn"]}, "convert: mnn and mnn-llm both make the folder mnn; convert to one of them."),
        ({"convert": "tpu"}, "convert.target: target is 'tpu'; expected 'mnn-llm',"),
    ],
)
def test_a_mistake_is_named_by_its_option(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(lowbit.RecipeError) as caught:
        lowbit.Recipe(PYDOCS, **{"passes": [QuantizeMatmul(bits=4)], **sections})
    assert str(caught.value).startswith(message)


def test_a_plain_script_needs_no_main_guard(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """It is not run again by the process that exports, and gets the figures of the run."""
    code = f"""
import lowbit
print("begins")
result = lowbit.quantize({str(tiny("llama"))!r}, bits=3, block_size=32, validate={SHORT!r}, name="mine")
print("KL", result.quality.kl_divergence, result.size.mnn_bytes, result.folder)
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begins") == 1
    assert "write onnx" in done.stdout, "progress of a plain log: a line a step"
    _, kl, size, folder = done.stdout.splitlines()[-1].split()
    manifest = json.loads((tmp_path / folder / "manifest.json").read_text("utf-8"))
    assert float(kl) == manifest["quality"]["onnxruntime"]["kl_divergence"]
    assert int(size) == sum(file.stat().st_size for file in (tmp_path / folder / "mnn").iterdir())


def test_a_result_is_shown_checked_and_compared(tiny: Callable[..., Path], tmp_path: Path, export: Callable[..., Path]) -> None:
    export("llama", Store(tmp_path / ".store"))
    results = [
        lowbit.quantize(tiny("llama"), bits=bits, block_size=32, validate=SHORT, name=f"q{bits}", build=tmp_path, console=QUIET)
        for bits in (4, 2)
    ]
    first, second = results
    assert 0 < (first.quality.kl_divergence or 0) < (second.quality.kl_divergence or 0)
    assert second.size.bits_per_weight < first.size.bits_per_weight
    assert "bits per weight" in str(first)
    card = first._repr_html_()
    assert "<b>q4</b>" in card
    assert f"{first.size.mnn_bytes / 1e6:.2f} MB" in card
    assert lowbit.check(first.folder)["weights"] == first.manifest.hand_offs["mnn"].weights_checked
    found = lowbit.compare(first.folder, second.folder, into=tmp_path / "compare.html")
    assert [row[0] for row in found.rows()] == ["q4", "q2"]
    assert "<td" in found._repr_html_()
    assert found.figures()["results"]["q2"]["quality"]["onnxruntime"]["kl_divergence"] == second.quality.kl_divergence
    assert found.page.read_text("utf-8").startswith("<!")
    planned = lowbit.plan(lowbit.recipe_for(tiny("llama"), bits=4, block_size=32, validate=SHORT), tmp_path)
    assert planned.bits_per_weight == pytest.approx(first.size.bits_per_weight)


def test_a_log_lies_beside_the_result(tiny: Callable[..., Path], tmp_path: Path, export: Callable[..., Path]) -> None:
    """Of what went well and of what did not; the result does not depend on it."""
    export("llama", Store(tmp_path / ".store"))
    result = lowbit.quantize(
        tiny("llama"), bits=4, validate=False, convert="mnn-llm", name="mine", build=tmp_path, console=QUIET
    )
    log = result.folder / "run.log"
    assert "write onnx" in log.read_text("utf-8")
    assert "run.log" not in result.manifest.files
    with pytest.raises(lowbit.PassError):
        lowbit.quantize(
            tiny("llama"), [QuantizeMatmul(bits=4, include=("nothing",))], name="mine", build=tmp_path, console=QUIET
        )
    text = log.read_text("utf-8")
    assert "ended by an error" in text
    assert "Traceback" in text
    assert lowbit.check(result.folder)["files"] == len(result.manifest.files)


def test_what_a_library_printed_is_shown_with_its_failure(tmp_path: Path) -> None:
    from lowbit.pipeline.runtime.isolate import isolated

    assert isolated(np.add, 1, 2) == 3
    with pytest.raises(FileNotFoundError) as caught:
        isolated(np.load, tmp_path / "none.npy")
    assert "what was printed before:" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="status 3") as caught_exit:
        isolated(exec, "import os; print('a word', flush=True); os._exit(3)")
    assert caught_exit.value.__notes__ == ["what was printed before:\na word"]
