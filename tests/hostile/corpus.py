"""Files that mean harm, made by a script: `CASES[name](folder, good)` breaks a copy of a good checkpoint and returns a recipe.

A canary lies outside each folder: what reads it has followed a path that it should not. Covered are the advisories on ONNX's
external data: CVE-2022-25882 and 2024-27318 (traversal), 2024-27319 (out of bounds), 2026-27489 and 2026-34447 (links),
2026-34446 (hard links), 2026-34445 (attributes, sizes), 2025-51480 (writing by a name of the file's).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

CANARY = b"canary: nobody may read this " * 64
Case = Callable[[Path, Path], Path]
CASES: dict[str, tuple[Case, str]] = {}
PASSES = "passes: [narrow_embedding, {quantize_matmul: {bits: 4, block_size: 32}}]"
REST = "validate: {window: 64, windows: 2}\nconvert: {}"


def case(message: str) -> Callable[[Case], Case]:
    """Register a case, and what it is refused with."""

    def register(make: Case) -> Case:
        CASES[make.__name__] = make, message
        return make

    return register


def many(message: str, **cases: Any) -> Callable[[Callable[[Path, Path, Any], Path]], None]:
    """Register one case for each value."""

    def register(make: Callable[[Path, Path, Any], Path]) -> None:
        for name, value in cases.items():
            CASES[f"{make.__name__}_{name}"] = (lambda folder, good, v=value: make(folder, good, v)), message  # type: ignore[misc]

    return register


def checkpoint(folder: Path, good: Path) -> Path:
    shutil.copytree(good, folder / "model")
    (folder / "canary").write_bytes(CANARY)
    return folder / "model"


def recipe(folder: Path, text: str = "") -> Path:
    path = folder / "mine.yaml"
    path.write_text(text or f"model: ./model\n{PASSES}\n{REST}\n", "utf-8")
    return path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


# --- checkpoints: safetensors


@many(
    r"not a safetensors file|header is|data_offsets|lies at bytes|has the shape|its shape|follow the last|no weight|missing",
    no_json=b"{nonsense", a_list=b"[1, 2]", not_utf8=b'{"\xff\xfe": 1}', deep=b'{"a":' + b"[" * 200_000,
    overlap=b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
    gap=b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
    beyond=b'{"a":{"dtype":"F32","shape":[99999],"data_offsets":[0,399996]}}',
    overflow=b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
    negative=b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
    backwards=b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
    odd_type=b'{"a":{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}}',
    fractions=b'{"a":{"dtype":"F32","shape":[4.0],"data_offsets":[0,16.0]}}',
    wrong_type=b'{"a":{"dtype":"F64","shape":[4],"data_offsets":[0,16]}}',
)  # fmt: skip
def header(folder: Path, good: Path, text: bytes) -> Path:
    for old in checkpoint(folder, good).glob("*.safetensors"):
        old.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    return recipe(folder)


@many("not a safetensors file, or cut short", longest=(1 << 64) - 1, hundred_megabytes=99_999_999, zero=0)
def header_length(folder: Path, good: Path, length: int) -> Path:
    file = next(checkpoint(folder, good).glob("*.safetensors"))
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", length))
        stream.truncate(200_000_000)  # sparse
    return recipe(folder)


@many("is not a plain file name|does not name shards", traversal="../canary", absolute="/etc/passwd", hidden="..", number=7)
def shard(folder: Path, good: Path, name: Any) -> Path:
    model = checkpoint(folder, good)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    return recipe(folder)


@many("does not name shards|not readable as JSON|expected a JSON object", a_list=[1], text="x", nothing=None)
def shard_map(folder: Path, good: Path, value: Any) -> Path:
    (checkpoint(folder, good) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    return recipe(folder)


@case("is a link to .*canary, outside")
def linked_shard(folder: Path, good: Path) -> Path:
    file = next(checkpoint(folder, good).glob("*.safetensors"))
    file.unlink()
    file.symlink_to("../canary")
    return recipe(folder)


@case("A pickle can run any code")
def pickled_checkpoint(folder: Path, good: Path) -> Path:
    model = checkpoint(folder, good)
    next(model.glob("*.safetensors")).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(str(folder / "ran"))))
    return recipe(folder)


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


# --- checkpoints: configuration, tokenizer, template


@many(
    "config.json",
    a_list="[1]", deep="[" * 200_000, text="nonsense", no_type="{}",
    code='{"model_type": "evil", "auto_map": {"AutoConfig": "evil.py--Evil"}}',
)  # fmt: skip
def config(folder: Path, good: Path, text: str) -> Path:
    model = checkpoint(folder, good)
    (model / "config.json").write_text(text)
    (model / "evil.py").write_text(f"import os; os.mkdir({str(folder / 'ran')!r})")
    return recipe(folder)


@many(
    "config.json|belong to different models",
    layers={"num_hidden_layers": 10**9}, more_layers={"num_hidden_layers": 999},
    no_layers={"num_hidden_layers": 0}, text={"hidden_size": "64; rm -rf /"},
    width={"hidden_size": 1 << 40}, vocabulary={"vocab_size": 1 << 40}, negative={"intermediate_size": -1},
    heads={"num_attention_heads": 0}, positions={"max_position_embeddings": 1 << 50}, act={"hidden_act": "__import__('os')"},
)  # fmt: skip
def dimensions(folder: Path, good: Path, changes: dict[str, Any]) -> Path:
    edit(checkpoint(folder, good) / "config.json", **changes)
    return recipe(folder)


@many(
    "tokenizer.json",
    no_json="nonsense", deep='{"model":' + "[" * 200_000, a_list="[]",
    beyond='{"model":{"type":"BPE","vocab":{"a":0,"b":999999},"merges":[]},"added_tokens":[]}',
)  # fmt: skip
def tokenizer(folder: Path, good: Path, text: str) -> Path:
    (checkpoint(folder, good) / "tokenizer.json").write_text(text)
    return recipe(folder)


@many(
    "chat template",
    escape="{{ ''.__class__.__mro__[1].__subclasses__() }}", code="{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
    endless="{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}",
    large="{{ 'x' * 99999999999 }}", broken="{% if %}",
)  # fmt: skip
def template(folder: Path, good: Path, text: str) -> Path:
    edit(checkpoint(folder, good) / "tokenizer_config.json", chat_template=text)
    return recipe(folder)


# --- ONNX files


def onnx_model(folder: Path, **place: str) -> Path:
    """A graph with one large weight in a file beside it, its place as `place` says."""
    folder.mkdir(exist_ok=True)
    (folder.parent / "canary").write_bytes(CANARY)
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    (folder / "own.data").write_bytes(values.tobytes())
    weight = TensorProto(name="a_weight", data_type=TensorProto.FLOAT, dims=[64, 32], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": "own.data", "offset": "0", "length": str(values.nbytes)} | place).items():
        weight.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, k]) for name, k in (("x", 64), ("y", 32)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "a_weight"], ["y"])], "g", [x], [y], [weight])
    file = folder / "own.onnx"
    file.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())
    return file


def onnx_recipe(folder: Path, more: str = "validate: {}") -> Path:
    text = f"model: ./model/own.onnx\npasses: [{{quantize_matmul: {{bits: 4, block_size: 32}}}}]\n{more}\n"
    return recipe(folder, text)


@many(
    "not a valid ONNX model|external data",
    traversal={"location": "../canary"}, deep_traversal={"location": "a/../../canary"}, absolute={"location": "/etc/passwd"},
    backslashes={"location": "..\\canary"}, nowhere={"location": ""}, a_folder={"location": "."},
    nul={"location": "own\0.data"},
    negative={"offset": "-8"}, beyond={"offset": "4096"}, huge={"offset": str(1 << 62)}, long={"length": str(1 << 62)},
    short={"length": "4"}, text={"offset": "abc"}, attribute={"__class__": "x"}, dunder={"checksum": "0", "__dict__": "{}"},
)  # fmt: skip
def external(folder: Path, good: Path, place: dict[str, str]) -> Path:
    onnx_model(folder / "model", **place)
    return onnx_recipe(folder)


@case("not a valid ONNX model|external data")
def external_symlink(folder: Path, good: Path) -> Path:
    file = onnx_model(folder / "model").with_name("own.data")
    file.unlink()
    file.symlink_to("../canary")
    return onnx_recipe(folder)


@case("not a valid ONNX model|external data")
def external_linked_folder(folder: Path, good: Path) -> Path:
    onnx_model(folder / "model", location="sub/canary")
    (folder / "model" / "sub").symlink_to("..")
    return onnx_recipe(folder)


@case("not a valid ONNX model|external data")
def external_hard_link(folder: Path, good: Path) -> Path:
    file = onnx_model(folder / "model").with_name("own.data")
    file.unlink()
    file.hardlink_to(folder / "canary")
    return onnx_recipe(folder)


@many(
    "not a valid ONNX model",
    text=b"not a model",
    empty=b"",
    cut=None,
    zip=b"PK\x03\x04" + b"\0" * 100,
    pickle=b"\x80\x04K\x01.",
)
def onnx_file(folder: Path, good: Path, content: bytes | None) -> Path:
    file = onnx_model(folder / "model")
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    return onnx_recipe(folder)


@case("not a valid ONNX model|external data")
def onnx_dimensions(folder: Path, good: Path) -> Path:
    file = onnx_model(folder / "model")
    model = onnx.load(str(file), load_external_data=False)
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]
    file.write_bytes(model.SerializeToString())
    return onnx_recipe(folder)


@case("not a valid ONNX model|external data")
def onnx_raw_data(folder: Path, good: Path) -> Path:
    file = onnx_model(folder / "model")
    model = onnx.load(str(file), load_external_data=False)
    weight = TensorProto(name="a_weight", data_type=TensorProto.FLOAT, dims=[64, 32], raw_data=b"\0" * 100)
    model.graph.initializer[0].CopyFrom(weight)
    file.write_bytes(model.SerializeToString())
    return onnx_recipe(folder)


@case("may be nan|is nan|is inf|Only finite weights")
def onnx_not_numbers(folder: Path, good: Path) -> Path:
    (onnx_model(folder / "model").with_name("own.data")).write_bytes(np.full((64, 32), np.nan, np.float32).tobytes())
    return onnx_recipe(folder)


@case("cannot be read as an .npz file of arrays")
def pickled_inputs(folder: Path, good: Path) -> Path:
    onnx_model(folder / "model")
    np.savez(folder / "x.npz", x=np.array([_Bomb(str(folder / "ran"))], object))
    return onnx_recipe(folder, "validate: {inputs: ./x.npz}")


@case("are larger than")
def inflated_inputs(folder: Path, good: Path) -> Path:
    onnx_model(folder / "model")
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 30,)})
    with (
        zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(head.getvalue())
        for _ in range(1100):
            file.write(b"\0" * (1 << 20))
    return onnx_recipe(folder, "validate: {inputs: ./x.npz}")


# --- recipes


@many(
    r"mine.yaml:\d+:\d+: |mine.yaml: ",
    bomb="a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c\n", tag="model: !!python/object/apply:os.system [ls]\n",
    new="model: !!python/object/new:os.mkdir [ran]\n", deep="model: " + "[" * 5000, twice="model: a\nmodel: b\n",
    huge="# " + "x" * (2 << 20), merge="model: {<<: {a: 1}}\npasses: [x]\n", nul="model: \0\n",
    plugin="model: ./model\npasses: [os.path]\n",
    method="model: ./model\npasses: [{quantize_matmul: {bits: 4, method: os.path}}]\n",
)  # fmt: skip
def yaml_text(folder: Path, good: Path, text: str) -> Path:
    checkpoint(folder, good)
    return recipe(folder, text)
