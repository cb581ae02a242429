"""Any recipe, any graph, any changed byte: an error with its place, the same numbers, or a notice."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from lowbit.passes.base import PassError
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.pack import pack_codes, unpack_codes
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.convert.mnn.proof_codes import compare_codes
from lowbit.pipeline.convert.mnn.weights import pack_msb
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.recipe.load import load_recipe
from tests.graphs import run
from tests.running import run_in_process
from tests.tiny import recipe_text

QUIET = Console(quiet=True)
BITS = (2, 3, 4, 8)
WORDS = (
    "model", "passes", "validate", "convert", "export", "calibrate", "quantize_matmul", "narrow_embedding", "bits", "method",
    "rtn", "include", "allocate_bits", "fit", "target", "mnn-llm", "windows", "text", "./x", "*", "",
)  # fmt: skip
SCALARS = st.one_of(
    st.sampled_from(WORDS), st.integers(-(10**20), 10**20), st.floats(), st.booleans(), st.none(), st.text(max_size=8)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(WORDS), inner, max_size=5)),
    max_leaves=20,
)
SHAPED = st.fixed_dictionaries({"model": TREES, "passes": TREES}, optional=dict.fromkeys(WORDS[2:6], TREES))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(TREES, SHAPED))
def test_any_tree_is_a_recipe_or_an_error_with_its_place(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8")
    try:
        load_recipe(path)
    except RecipeError as error:
        said = str(error)
    else:
        return
    assert re.match(rf"{re.escape(str(path))}(:\d+:\d+)?: ", said)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_with_their_place(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(str(path))):
        load_recipe(path)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(BITS), st.sampled_from([16, 32, 64]), st.integers(0, 2**32 - 1))
def test_packing_is_undone_by_unpacking_in_both_layouts(rows: int, blocks: int, bits: int, size: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, blocks * size), np.uint8)
    packed, stream = pack_codes(codes, bits), pack_msb(codes.reshape(-1), bits)
    np.testing.assert_array_equal(unpack_codes(packed, bits, codes.shape[1]), codes)
    assert compare_codes(packed.reshape(rows, -1), stream, bits, codes.shape[1]) == -1  # MNN's stream holds the same
    place = seed % codes.size
    codes.reshape(-1)[place] ^= 1
    assert compare_codes(packed.reshape(rows, -1), pack_msb(codes.reshape(-1), bits), bits, codes.shape[1]) == place


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Chains and branches of MatMuls by constants, with what stands between them in real graphs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.sampled_from([16, 24, 32, 48]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])
    nodes, weights, alive = [], [], {"x": width}
    for i in range(draw(st.integers(1, 5))):
        source = draw(st.sampled_from(sorted(alive)))
        kind = draw(st.sampled_from(["MatMul", "MatMul", "Relu", "Add", "Tanh", "Transposed"]))
        name, k = f"t{i}", alive[source]
        if kind in ("MatMul", "Transposed"):
            n = draw(st.sampled_from([8, 16, 40]))
            w = rng.standard_normal((k, n)).astype(np.float32) / k**0.5
            stored = w if kind == "MatMul" else np.ascontiguousarray(w.T)
            weights.append(numpy_helper.from_array(stored, f"w{i}_weight"))
            if kind == "Transposed":
                nodes.append(helper.make_node("Transpose", [f"w{i}_weight"], [f"w{i}_turned"], perm=[1, 0]))
            operand = f"w{i}_weight" if kind == "MatMul" else f"w{i}_turned"
            nodes.append(helper.make_node("MatMul", [source, operand], [name], name=name))
            alive[name] = n
        else:
            nodes.append(helper.make_node(kind, [source, source] if kind == "Add" else [source], [name], name=name))
            alive[name] = k
    del alive["x"]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in alive.items()]
    graph = helper.make_graph(nodes, "g", [x], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.booleans())
def test_eight_bits_are_close_to_the_original(model: onnx.ModelProto, symmetric: bool) -> None:
    onnx.checker.check_model(model)
    feed = {"x": np.random.default_rng(0).standard_normal((3, model.graph.input[0].type.tensor_type.shape.dim[1].dim_value))}
    feed = {"x": feed["x"].astype(np.float32)}
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    graph = gs.import_onnx(model)
    matmuls = sum(node.op == "MatMul" for node in graph.nodes)
    options = QuantizeMatmul(bits=8, block_size=16, symmetric=symmetric, accuracy_level=0)
    if not matmuls:
        with pytest.raises(PassError):
            options.apply(graph)
        return
    assert len(options.apply(graph).rewritten) == matmuls
    quantized = run(graph, check=False, **feed)
    for ours, theirs in zip(quantized, expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 0.03 * np.linalg.norm(theirs) + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shapes_that_do_not_divide(bits: int) -> None:
    for k in range(1, 70, 7):
        rows = np.random.default_rng(k).standard_normal((3, k)).astype(np.float32)
        blocks = Rtn().quantize(rows, BlockFormat(bits, 16, False, "fp32"))
        assert blocks.dequantize(k).shape == rows.shape


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("flip")
    path = folder / "mine.yaml"
    path.write_text(
        recipe_text(
            tiny("llama"), "narrow_embedding", "quantize_matmul: {bits: 3, block_size: 32, method: mse}",
            convert="convert: {}", validate="validate: {window: 64, windows: 2}",
        ),
        "utf-8",
    )  # fmt: skip
    return path, run_in_process(load_recipe(path), folder / "build")


def flip(path: Path, seed: int) -> bytes:
    """Change one byte of a file; returns what it was."""
    content = path.read_bytes()
    place = int(np.random.default_rng(seed).integers(len(content)))
    path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
    return content


def test_check_notices_one_byte_of_every_file(made: tuple[Path, Path]) -> None:
    _, folder = made
    names = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
    assert {Path(name).parts[0] for name in names} >= {"onnx", "mnn", "recipe.yaml", "report.html", "README.md"}
    for seed, name in enumerate(sorted(names)):
        kept = flip(folder / name, seed)
        with pytest.raises(PipelineError, match=re.escape(Path(name).name)):
            check_folder(folder)
        (folder / name).write_bytes(kept)
    check_folder(folder)
    kept = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(kept[:-20])
    with pytest.raises(PipelineError, match=r"manifest\.json: damaged"):
        check_folder(folder)
    (folder / "manifest.json").write_bytes(kept)


def test_the_next_run_notices_one_byte_of_every_kind_of_entry(made: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = made
    build = tmp_path / "build"
    shutil.copytree(folder.parent, build)
    before = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
    kinds: dict[str, Path] = {}
    for file in sorted((build / ".store").glob("*/*/*")):
        beside = sorted(one.name for one in file.parent.iterdir())
        kinds.setdefault(file.name if file.name != "entry.json" else f"entry of {beside}", file)
    assert {"codes", "scales", "hidden.npy", "model.onnx"} <= set(kinds)
    for seed, file in enumerate(kinds.values()):
        flip(file, seed)
    run_in_process(load_recipe(path), build)
    after = json.loads((build / "mine" / "manifest.json").read_text("utf-8"))["files"]
    results = [name for name in before if name.startswith(("onnx", "mnn"))]
    assert [after[name] for name in results] == [before[name] for name in results]
    check_folder(build / "mine")
