"""A lowered graph -> llm.mnn: the stock converter makes it, its JSON form takes the operators ONNX lacks.

Placeholders become opaque `Extra` operators; here they turn into Convolution, RoPE and Attention. The JSON
form prints about six digits of each float, so every float constant is put back from the ONNX graph on the way,
and found again, byte for byte, in the file that results.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes._decoder import find_norms
from passes._lowered_ops import ROPES
from pipeline.convert.mnn_converter import convert, read_json, write_json
from pipeline.convert.mnn_floats import exact_values, words_of
from pipeline.convert.mnn_weights import MnnLayer
from pipeline.errors import ConvertError

NHWC = "NHWC"
GAMMAS = {"q_gamma": "q_norm", "k_gamma": "k_norm"}
"""What NormedRoPE calls the weights of its norms, and what MNN's RoPE calls them."""


def write_mnn(graph: gs.Graph, layers: dict[str, MnnLayer], target: Path, scratch: Path) -> None:
    """Write the MNN graph of `graph` (after lower_linear) to `target`; weights stay in their own file.

    Args:
        graph: lowered: RoPE, Attention and Linear placeholders, norms in plain form.
        layers: where each Linear finds its weight.
        scratch: a folder for what comes in between.

    Raises:
        ConvertError: the converter refuses, or the result lacks an operator or a constant.
    """
    nodes = {node.outputs[0].name: node for node in graph.nodes}
    gammas = {norm.y.name: norm for norm in find_norms(graph)}
    floats = {
        t.name: np.asarray(t.values) for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.dtype == np.float32
    }
    floats |= {node.outputs[0].name: np.asarray(node.attrs["value"].values) for node in graph.nodes if node.op == "Constant"}
    bare = graph.copy()
    bare.functions.clear()
    onnx.save(gs.export_onnx(bare), str(scratch / "lowered.onnx"))
    first = scratch / "converted.mnn"
    options = ("--allowCustomOp", "--transformerFuse", "--transformerFuseC4=0")
    convert("ONNX", scratch / "lowered.onnx", first, *options)
    document = read_json(first, scratch / "converted.json")
    editor, words = Editor(document), words_of(first)
    for op in document["oplists"]:
        match op["type"]:
            case "Extra":
                editor.replace(op, nodes, layers)
            case "LayerNorm":
                norm = gammas.pop(op["name"], None)
                if norm is None:
                    raise ConvertError(f"the converter made a LayerNorm '{op['name']}' of no norm in the graph.")
                _exact_norm(op["main"], np.asarray(norm.gamma.values), norm.epsilon)
                editor.ops.append(op)
            case _:
                _exact_constant(op, floats, words)
                editor.ops.append(op)
    if gammas:
        raise ConvertError(f"the converter did not fuse the norm '{next(iter(gammas))}'.")
    document["oplists"] = editor.ops
    edited = scratch / "edited.mnn"
    write_json(document, edited, scratch / "edited.json")
    # fused RoPE needs the packed layout that this pass arranges
    convert("MNN", edited, target, "--optimizeLevel=1", "--transformerFuseC4=1")
    name_by_content(target, read_json(target, scratch / "named.json")["mnn_uuid"])
    check_graph(graph, target, scratch)


def check_graph(graph: gs.Graph, mnn_file: Path, scratch: Path) -> None:
    """Prove that the final file has every operator, in the packed layout, and every float constant exactly."""
    document = read_json(mnn_file, scratch / "final.json")
    kinds = [op["type"] for op in document["oplists"]]
    wanted = {"Convolution": ("Linear",), "RoPE": ROPES, "Attention": ("Attention",)}
    for theirs, ours in wanted.items():
        count = sum(node.op in ours for node in graph.nodes)
        if kinds.count(theirs) != count:
            raise ConvertError(f"{mnn_file.name} has {kinds.count(theirs)} {theirs} operators, expected {count}.")
    if "Extra" in kinds:
        raise ConvertError(f"{mnn_file.name} still has operators that MNN does not know.")
    unpacked = [op["name"] for op in document["oplists"] if op["type"] == "Attention" and not op["main"].get("output_c4")]
    if unpacked:
        raise ConvertError(f"MNN's layout pass left '{unpacked[0]}' unpacked; its RoPE would fail at run time.")
    content = mnn_file.read_bytes()
    constants = {norm.gamma.name: norm.gamma for norm in find_norms(graph)}
    constants |= {t.name: t for t in graph.tensors().values() if t.name == "rotary.inv_freq"}
    values = {name: np.asarray(constant.values) for name, constant in constants.items()}
    values |= {f"{n.name}.{g}": np.array(n.attrs[g]) for n in graph.nodes for g in GAMMAS if g in n.attrs}
    for name, value in values.items():
        if np.ascontiguousarray(value, np.float32).tobytes() not in content:
            raise ConvertError(f"{mnn_file.name}: the constant '{name}' is not there bit for bit.")


def name_by_content(mnn_file: Path, drawn: str) -> None:
    """Replace the random identifier that the converter draws by one made of the content: same input, same bytes."""
    content = mnn_file.read_bytes()
    if content.count(drawn.encode()) != 1:
        raise ConvertError(f"{mnn_file.name} does not have its identifier {drawn} once.")
    rest = content.replace(drawn.encode(), b"\0" * len(drawn))
    named = str(uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(rest).hexdigest()))
    mnn_file.write_bytes(content.replace(drawn.encode(), named.encode()))


class Editor:
    """Builds the new list of operators, naming the tensors it adds."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.names: list[str] = document["tensorName"]
        self.ops: list[dict[str, Any]] = []

    def replace(self, op: dict[str, Any], nodes: dict[str, gs.Node], layers: dict[str, MnnLayer]) -> None:
        """Append what an Extra operator stands for."""
        kind = op["main"]["type"]
        node = nodes.get(op["name"])
        if node is None or node.op != kind:
            raise ConvertError(f"the converter does not know the operator {kind} of '{op['name']}'.")
        if kind == "Linear":
            self.linear(node.name, op, layers[node.name], [1, -1, layers[node.name].layer.n])
        elif kind in ROPES:
            (heads, dim), kv_heads = node.attrs["q_shape"][2:], node.attrs["k_shape"][2]
            main = {"rope_cut_head_dim": dim, "num_head": heads, "kv_num_head": kv_heads, "head_dim": dim}
            main |= {theirs: _head_norm(node.attrs, ours) for ours, theirs in GAMMAS.items() if ours in node.attrs}
            self._add(op["name"], "RoPE", op["inputIndexes"], op["outputIndexes"], "RoPEParam", main)
        elif kind == "Attention":
            main = {"kv_cache": True, "layer_index": node.attrs["layer"], "kv_shared_layer_index": -1}
            self._add(op["name"], "Attention", op["inputIndexes"], op["outputIndexes"], "AttentionParam", main)
        else:
            raise ConvertError(f"MNN has no operator for {kind} ('{op['name']}').")

    def linear(self, name: str, op: dict[str, Any], layer: MnnLayer, shape: list[int]) -> None:
        """The five operators around a 1x1 convolution that MNN's layout pass recognizes as a linear layer; `shape` is y's."""
        rows, packed, product, unpacked = (self._tensor(f"{name}.{part}") for part in ("rows", "packed", "conv", "out"))
        stored = layer.layer
        before = {"dims": [-1, stored.padded_k, 1, 1], "dimType": "NCHW"}
        after = {"dims": shape, "dimType": "NCHW"}
        pack, unpack = ({"source": a, "dest": b} for a, b in (("NCHW", "NC4HW4"), ("NC4HW4", "NCHW")))
        self._add(f"{name}.rows", "Reshape", op["inputIndexes"], [rows], "Reshape", before)
        self._add(f"{name}.pack", "ConvertTensor", [rows], [packed], "TensorConvertInfo", pack)
        self._add(name, "Convolution", [packed], [product], "Convolution2D", layer.convolution())
        self._add(f"{name}.unpack", "ConvertTensor", [product], [unpacked], "TensorConvertInfo", unpack)
        self._add(f"{name}.y", "Reshape", [unpacked], op["outputIndexes"], "Reshape", after)

    def _tensor(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def _add(self, name: str, kind: str, inputs: list[int], outputs: list[int], main_type: str, main: dict[str, Any]) -> None:
        self.ops.append(
            {
                "name": name, "type": kind, "inputIndexes": inputs, "outputIndexes": outputs,
                "main_type": main_type, "main": main, "defaultDimentionFormat": NHWC,
            }
        )  # fmt: skip


def _head_norm(attrs: dict[str, Any], gamma: str) -> dict[str, Any]:
    """MNN's LayerNorm inside its RoPE."""
    return {"axis": [-1], "epsilon": float(np.float32(attrs["epsilon"])), "gamma": attrs[gamma], "useRMSNorm": True}


def _exact_norm(main: dict[str, Any], gamma: np.ndarray, epsilon: float) -> None:
    if not np.allclose(main["gamma"], gamma, rtol=1e-5, atol=1e-6) or any(main.get("beta", [])):
        raise ConvertError("the converter's LayerNorm has another gamma than the graph.")
    main["gamma"] = [float(g) for g in gamma]
    main["epsilon"] = float(np.float32(epsilon))


def _exact_constant(op: dict[str, Any], floats: dict[str, np.ndarray], words: np.ndarray) -> None:
    """Put the exact values of a float constant back into its JSON form."""
    main = op.get("main") or {}
    if op["type"] != "Const" or main.get("dataType", "DT_FLOAT") != "DT_FLOAT" or "float32s" not in main:
        return
    main["float32s"] = exact_values(op["name"], np.array(main["float32s"]), floats.get(op["name"]), words)
