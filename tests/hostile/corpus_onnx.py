"""More files that mean harm, ONNX graphs and inputs, in families: each type, each operator set, each broken archive."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.hostile.corpus import case, many, onnx_model, onnx_recipe

Change = Callable[[onnx.ModelProto], Any]
TYPES = {name.lower(): number for name, number in TensorProto.DataType.items() if name not in ("FLOAT", "FLOAT16", "BFLOAT16")}


def changed(folder: Path, change: Change) -> Path:
    """A recipe for a good graph that `change` has changed."""
    file = onnx_model(folder / "model")
    model = onnx.load(str(file), load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())
    return onnx_recipe(folder)


@many("own.onnx: |mine.yaml: |a_weight", **TYPES, unknown=99)
def weight_type(folder: Path, good: Path, number: int) -> Path:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].data_type = number

    return changed(folder, change)


@many("own.onnx: ", zero=0, negative=-1, next=99, huge=1 << 60)
def opset(folder: Path, good: Path, version: int) -> Path:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return changed(folder, change)


def _constant(model: onnx.ModelProto, kind: str, sizes: list[int]) -> None:
    shape = helper.make_node("Constant", [], ["k"], value=helper.make_tensor("k", TensorProto.INT64, [len(sizes)], sizes))
    given = ["k"] if kind == "ConstantOfShape" else ["x", "k"]
    model.graph.node.extend([shape, helper.make_node(kind, given, ["large"])])


@many(
    "own.onnx: makes .* elements of constants|own.onnx: not a valid",
    fill=("ConstantOfShape", [1 << 20, 1 << 20]), expand=("Expand", [1 << 20, 1 << 20]), tile=("Tile", [1 << 20, 1 << 20]),
    overflow=("ConstantOfShape", [1 << 62, 1 << 62]),
)  # fmt: skip
def constant(folder: Path, good: Path, what: tuple[str, list[int]]) -> Path:
    return changed(folder, lambda model: _constant(model, *what))


def _loop(model: onnx.ModelProto, rounds: int | None) -> None:
    text = "b (int64 i, bool c, float v) => (bool d, float w) { d = Identity (c) w = Identity (v) }"
    body = onnx.parser.parse_graph(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(rounds or 0), "rounds"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.float32), "start"))
    given = ["rounds" if rounds else "", "yes", "start"]
    model.graph.node.append(helper.make_node("Loop", given, ["end"], body=body))


@many("may have no end", without=None, many=1 << 40)
def loop(folder: Path, good: Path, rounds: int | None) -> Path:
    return changed(folder, lambda model: _loop(model, rounds))


def _sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("a_weight", TensorProto.FLOAT, [1], [2.0])
    places = helper.make_tensor("", TensorProto.INT64, [1], [3])
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [64, 32]))


@case("sparse tensor")
def onnx_sparse(folder: Path, good: Path) -> Path:
    return changed(folder, _sparse)


def _nested(model: onnx.ModelProto) -> None:
    body = onnx.parser.parse_graph("g () => (float y) { y = Constant <value = float {1}> () }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    for level in range(12):
        node = helper.make_node("If", ["yes"], [f"y{level}"], then_branch=body, else_branch=body)
        body = helper.make_graph([node], "g", [], [helper.make_tensor_value_info(f"y{level}", TensorProto.FLOAT, [])])
    model.graph.node.append(node)


@case("in one another more than 8 deep|not a valid ONNX model")
def onnx_nested(folder: Path, good: Path) -> Path:
    return changed(folder, _nested)


def _array(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values), allow_pickle=False)
    return stream.getvalue()


X = _array(np.ones((1, 64), np.float32))


@many(
    "validate: ",
    text={"x.npy": b"nothing"}, empty={"x.npy": b""}, cut={"x.npy": X[:-8]}, head={"x.npy": X[:20]}, nothing={},
    other={"z.npy": X},
    more={"x.npy": X, "z.npy": X}, integers={"x.npy": _array(np.ones((1, 64), np.int64))},
    texts={"x.npy": _array(["a"])}, nan={"x.npy": _array(np.full((1, 64), np.nan, np.float32))},
    infinite={"x.npy": _array(np.full((1, 64), np.inf, np.float32))}, escaping={"../x.npy": X},
    narrow={"x.npy": _array(np.ones((1, 63), np.float32))}, flat={"x.npy": _array(np.ones(64, np.float32))},
    no_rows={"x.npy": _array(np.ones((0, 64), np.float32))}, version={"x.npy": X[:6] + b"\x09\x09" + X[8:]},
)  # fmt: skip
def archive(folder: Path, good: Path, members: dict[str, bytes]) -> Path:
    onnx_model(folder / "model")
    with zipfile.ZipFile(folder / "x.npz", "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return onnx_recipe(folder, "validate: {inputs: ./x.npz}")


@many("validate: ", missing=None, text=b"nothing", empty=b"", array=X, cut=b"PK\x03\x04" + b"\0" * 40, folder="folder")
def archive_file(folder: Path, good: Path, content: bytes | str | None) -> Path:
    onnx_model(folder / "model")
    if content == "folder":
        (folder / "x.npz").mkdir()
    elif isinstance(content, bytes):
        (folder / "x.npz").write_bytes(content)
    return onnx_recipe(folder, "validate: {inputs: ./x.npz}")
