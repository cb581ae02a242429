"""An ONNX file of one's own: from a graph to both runtimes without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from lowbit.pipeline.checkpoint.onnx_model import open_onnx
from lowbit.pipeline.commands.plan import make_plan
from lowbit.pipeline.errors import CheckpointError, PipelineError, RecipeError
from lowbit.pipeline.recipe.load import load_recipe
from tests.graphs import random
from tests.running import run_in_process

GRAPH = """
<ir_version: 8, opset_import: ["": {opset}]>
g (float[batch, 3, 8, 8] image) => (float[batch, 10] classes)
{{
    convolved = Conv <pads = [1, 1, 1, 1]> (image, conv_weight, conv_bias)
    positive = LeakyRelu <alpha = 0.25> (convolved)
    flat = Flatten (positive)
    hidden = Gemm <transB = 1> (flat, a_weight, a_bias)
    product = MatMul (hidden, b_weight)
    root = Constant <value = float {{1.4142135}}> ()
    scaled = Div (product, root)
    erf = Erf (scaled)
    one = Constant <value = float {{1}}> ()
    shifted = Add (erf, one)
    gated = Mul (product, shifted)
    half = Constant <value = float {{0.5}}> ()
    gelu = Mul (gated, half)
    logits = MatMul (gelu, c_weight)
    classes = Softmax <axis = -1> (logits)
}}
"""
WEIGHTS = {
    "conv_weight": random(4, 3, 3, 3) / 3, "conv_bias": random(4), "a_weight": random(96, 256, seed=1) / 16,
    "a_bias": random(96, seed=2), "b_weight": random(96, 40, seed=3) / 10, "c_weight": random(40, 10, seed=4),
}  # fmt: skip


def write(path: Path, external: bool = False, opset: int = 18) -> Path:
    model = onnx.parser.parse_model(GRAPH.format(opset=opset))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in WEIGHTS.items())
    onnx.checker.check_model(model)
    onnx.save(model, str(path), save_as_external_data=external, location=f"{path.stem}.data", size_threshold=100)
    return path


def recipe(folder: Path, model: str, validate: str = "validate: {}", more: str = "", name: str = "own") -> Path:
    path = folder / f"{name}.yaml"
    three = "{bits: 3, block_size: 32, include: [a_weight]}"
    passes = f"passes:\n  - split_gemm\n  - quantize_matmul: {three}\n  - quantize_matmul: {{bits: 8, block_size: 32}}"
    path.write_text(f"model: {model}\n{more}\n{passes}\n{validate}\nconvert: {{target: mnn}}\n", "utf-8")
    return path


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("opset", [13, 18, 21])
def test_from_a_file_to_both_runtimes(tmp_path: Path, external: bool, opset: int) -> None:
    write(tmp_path / "own.onnx", external, opset)
    folder = run_in_process(load_recipe(recipe(tmp_path, "./own.onnx")), tmp_path / "build")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["weights"]) == {"a_weight", "b_weight", "c_weight"}
    assert manifest["quality"]["onnxruntime"]["outputs"]["classes"]["relative_error"] < 0.6
    assert manifest["quality"]["mnn"]["memory_high"]["relative_error"] < 1e-5
    assert manifest["model"]["source"] == "./own.onnx"
    assert "export" not in {step["name"] for step in manifest["steps"]}


def test_without_torch(tmp_path: Path) -> None:
    write(tmp_path / "own.onnx")
    path = recipe(tmp_path, "./own.onnx")
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    code += "from lowbit.pipeline.__main__ import main; main()"
    command = [sys.executable, "-c", code, "run", str(path), "--build", str(tmp_path / "build")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("equal bit for bit") == 1


def test_a_changed_weight_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    def figures() -> dict[str, float]:
        folder = run_in_process(load_recipe(path), tmp_path / "build")
        return dict(json.loads((folder / "manifest.json").read_text())["quality"]["mnn"]["memory_low"]["outputs"]["classes"])

    path = recipe(tmp_path, "./own.onnx")
    write(tmp_path / "own.onnx")
    before = figures()
    assert figures() == before
    model = onnx.load(str(tmp_path / "own.onnx"))
    bias = next(t for t in model.graph.initializer if t.name == "conv_bias")  # no quantized weight knows of it
    bias.CopyFrom(onnx.numpy_helper.from_array(random(4, seed=9), "conv_bias"))
    onnx.save(model, str(tmp_path / "own.onnx"))
    assert figures() != before


def test_the_plan_states_its_size(tmp_path: Path) -> None:
    write(tmp_path / "own.onnx")
    loaded = load_recipe(recipe(tmp_path, "./own.onnx"))
    plan = make_plan(loaded, tmp_path / "build", None)
    assert not (tmp_path / "build").exists()
    folder = run_in_process(loaded, tmp_path / "build")
    assert plan.onnx_bytes == pytest.approx((folder / "onnx" / "model.onnx.data").stat().st_size, rel=0.05)


def test_inputs_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "own.onnx")
    np.savez(tmp_path / "images.npz", image=random(5, 3, 8, 8))
    path = recipe(tmp_path, "./own.onnx", "validate: {inputs: images.npz, max_relative_error: 0.9}")
    folder = run_in_process(load_recipe(path), tmp_path / "build")
    assert json.loads((folder / "manifest.json").read_text())["quality"]["onnxruntime"]["samples"] == 1
    path = recipe(tmp_path, "./own.onnx", "validate: {inputs: images.npz, max_relative_error: 0.0001}")
    with pytest.raises(PipelineError, match=r"gate missed: max_relative_error: 0\.\d+, allowed 0\.0001"):
        run_in_process(load_recipe(path), tmp_path / "build")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": random(1, 3, 8, 8)}, r"holds \['picture'\], the model takes \['image'\]"),
        ({"image": random(1, 3, 8, 8).astype(np.float64)}, "'image' is float64, the model takes float32"),
        ({"image": np.full((1, 3, 8, 8), np.nan, np.float32)}, "'image' has values that are not finite"),
        ({"image": random(1, 3, 8, 9)}, r"'image' is \[1, 3, 8, 9\], the model takes \['batch', 3, 8, 8\]"),
        ({"image": random(0, 3, 8, 8)}, r"'image' is \[0, 3, 8, 8\], the model takes"),
        ({"image": np.full((1, 3, 8, 8), np.inf, np.float32)}, "'image' has values that are not finite"),
        (None, "cannot be read as an .npz file of arrays"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray] | None, message: str) -> None:
    write(tmp_path / "own.onnx")
    if arrays is None:
        (tmp_path / "images.npz").write_text("nothing")
    else:
        np.savez(tmp_path / "images.npz", allow_pickle=False, **arrays)
    path = recipe(tmp_path, "./own.onnx", "validate: {inputs: images.npz}")
    with pytest.raises(PipelineError, match=message):
        run_in_process(load_recipe(path), tmp_path / "build")


def test_inputs_that_nobody_can_guess(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (int64[n] ids) => (float[n, 8] y) { h = Gather (t, ids) y = MatMul (h, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(random(50, 32), "t"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(random(32, 8), "w"))
    onnx.save(model, str(tmp_path / "own.onnx"))
    path = tmp_path / "ids.yaml"
    path.write_text("model: ./own.onnx\npasses: [{quantize_matmul: {bits: 4, block_size: 32}}]\nvalidate: {}")
    with pytest.raises(PipelineError, match=r"nobody can tell what the input 'ids' \(int64 \['n'\]\) may be"):
        run_in_process(load_recipe(path), tmp_path / "build")


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("text.onnx", "empty.onnx"):
        with pytest.raises(CheckpointError, match="not a valid ONNX model"):
            open_onnx(tmp_path / name, name).graph()
    with pytest.raises(CheckpointError, match="no such ONNX file"):
        open_onnx(tmp_path / "none.onnx", "none.onnx")
    file = write(tmp_path / "own.onnx", external=True)
    (tmp_path / "own.data").unlink()
    with pytest.raises(CheckpointError, match="not a valid ONNX model: .*own.data"):
        open_onnx(file, "own.onnx").graph()


def test_sparse_tensors_are_refused_wherever_they_are(tmp_path: Path) -> None:
    """Read as dense ones they would be zeros."""
    values = onnx.helper.make_tensor("a_sparse", onnx.TensorProto.FLOAT, [1], [2.0])
    sparse = onnx.helper.make_sparse_tensor(values, onnx.helper.make_tensor("", onnx.TensorProto.INT64, [1], [3]), [24576])
    model = onnx.load(str(write(tmp_path / "own.onnx")))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    branch = onnx.parser.parse_graph("b () => (float z) { z = Constant <value = float {1}> () }")
    constant = onnx.helper.make_node("Constant", [], ["k"], sparse_value=sparse)
    for what, add in (
        ("the sparse tensor 'a_sparse'", lambda m: m.graph.sparse_initializer.append(sparse)),
        ("a sparse tensor in Constant 'k'", lambda m: m.graph.node.append(constant)),
        ("a sparse tensor in Constant 'k'", lambda m: (branch.node.append(constant), m.graph.node.append(_if(branch)))),
    ):
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        add(changed)
        onnx.save(changed, str(tmp_path / "sparse.onnx"))
        with pytest.raises(CheckpointError, match=f"has {what}; write its zeros out"):
            open_onnx(tmp_path / "sparse.onnx", "").graph()


def _if(branch: onnx.GraphProto) -> onnx.NodeProto:
    return onnx.helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    graph = open_onnx(write(tmp_path / "own.onnx", external=True), "own.onnx").graph()
    held = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and isinstance(t._values, np.ndarray)]
    assert sum(t.values.nbytes for t in held) < 1000


def test_an_export_of_an_onnx_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the model is an ONNX file, so there is nothing to export"):
        load_recipe(recipe(tmp_path, "./own.onnx", more="export: {task: feature-extraction}"))
