"""A lowered graph -> llm.mnn: the stock converter makes it, its JSON form takes the operators ONNX lacks.

Placeholders become opaque `Extra` operators; here they turn into Convolution, RoPE and Attention. The JSON
form prints about six digits of each float, so every float constant is put back from the ONNX graph on the way,
and found again, byte for byte, in the file that results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from lowbit.passes.graph.decoder import find_norms
from lowbit.passes.graph.lowered_ops import ROPES
from lowbit.pipeline.convert.mnn.converter import convert, read_json, write_json
from lowbit.pipeline.convert.mnn.editor import GAMMAS, Editor, name_by_content
from lowbit.pipeline.convert.mnn.exact_floats import Words, exact_values, words_of
from lowbit.pipeline.convert.mnn.weights import MnnLayer
from lowbit.pipeline.errors import ConvertError


def write_mnn(graph: gs.Graph, layers: dict[str, MnnLayer], target: Path, scratch: Path) -> None:
    """Write the MNN graph of `graph` (after lower_linear) to `target`; weights stay in their own file.

    Args:
        graph: lowered: RoPE, Attention and Linear placeholders, norms in plain form.
        layers: where each Linear finds its weight.
        scratch: a folder for what comes in between.

    Raises:
        ConvertError: the converter refuses, or the result lacks an operator or a constant.
    """
    first, edited = scratch / "converted.mnn", scratch / "edited.mnn"
    bare = graph.copy()
    bare.functions.clear()
    onnx.save(gs.export_onnx(bare), str(scratch / "lowered.onnx"))
    convert("ONNX", scratch / "lowered.onnx", first, "--allowCustomOp", "--transformerFuse", "--transformerFuseC4=0")
    document = read_json(first, scratch / "converted.json")
    _edit(document, graph, layers, words_of(first))
    write_json(document, edited, scratch / "edited.json")
    # fused RoPE needs the packed layout that this pass arranges
    convert("MNN", edited, target, "--optimizeLevel=1", "--transformerFuseC4=1")
    name_by_content(target, read_json(target, scratch / "named.json")["mnn_uuid"])
    check_graph(graph, target, scratch)


def _edit(document: dict[str, Any], graph: gs.Graph, layers: dict[str, MnnLayer], words: Words) -> None:
    """Turn placeholders into operators and rounded numbers into exact ones."""
    nodes = {node.outputs[0].name: node for node in graph.nodes}
    gammas = {norm.y.name: norm for norm in find_norms(graph)}
    floats = _float_constants(graph)
    editor = Editor(document)
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


def _float_constants(graph: gs.Graph) -> dict[str, npt.NDArray[Any]]:
    """Values by the name of their tensor: initializers in float32, and what Constant nodes hold."""
    constants = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.dtype == np.float32]
    inline = [node for node in graph.nodes if node.op == "Constant"]
    return {t.name: np.asarray(t.values) for t in constants} | {
        node.outputs[0].name: np.asarray(node.attrs["value"].values) for node in inline
    }


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


def _exact_norm(main: dict[str, Any], gamma: npt.NDArray[Any], epsilon: float) -> None:
    if not np.allclose(main["gamma"], gamma, rtol=1e-5, atol=1e-6) or any(main.get("beta", [])):
        raise ConvertError("the converter's LayerNorm has another gamma than the graph.")
    main["gamma"] = [float(g) for g in gamma]
    main["epsilon"] = float(np.float32(epsilon))


def _exact_constant(op: dict[str, Any], floats: dict[str, npt.NDArray[Any]], words: Words) -> None:
    """Put the exact values of a float constant back into its JSON form."""
    main = op.get("main") or {}
    if op["type"] != "Const" or main.get("dataType", "DT_FLOAT") != "DT_FLOAT" or "float32s" not in main:
        return
    main["float32s"] = exact_values(op["name"], np.array(main["float32s"]), floats.get(op["name"]), words)
