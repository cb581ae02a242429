"""A lowered graph of any kind -> model.mnn: the stock converter makes it, Linear placeholders take their codes.

Float constants of some size go from the converter straight into the weight file and are never printed. The small ones stay in
the graph, and the converter's JSON form rounds them to six decimals: they are put back from the ONNX graph or, where the
converter computed them, from the file that it wrote first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from lowbit.passes.quant.format import ScaleDtype
from lowbit.pipeline.convert.mnn.converter import convert, read_json, write_json
from lowbit.pipeline.convert.mnn.editor import Editor, name_by_content
from lowbit.pipeline.convert.mnn.exact_floats import Words, exact_values, words_of
from lowbit.pipeline.convert.mnn.weights import MnnLayer, lay_out
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.stored_layer import StoredLayer

GELU_STEPS = 4
"""x / sqrt(2), Erf, 1 +, x *, / 2 in any order: from the last of them, Erf is at most this far."""


def write_plain(
    model: onnx.ModelProto, layers: list[StoredLayer], scale_dtype: ScaleDtype, target: Path, scratch: Path
) -> list[MnnLayer]:
    """Write `model` (after lower_matmul, its float weights inside) to `target`, and those to `<target>.weight`.

    Returns:
        Where each layer shall lie, after what is there already.

    Raises:
        ConvertError: the converter refuses, or does not know an operator.
    """
    onnx.save(model, str(scratch / "lowered.onnx"))
    first, floats = scratch / "converted.mnn", scratch / "converted.mnn.weight"
    floats.unlink(missing_ok=True)
    convert("ONNX", scratch / "lowered.onnx", first, "--allowCustomOp", "--saveExternalData")
    weight_file = target.with_name(f"{target.name}.weight")
    weight_file.write_bytes(floats.read_bytes() if floats.exists() else b"")
    placed = lay_out([(layer, None) for layer in layers], scale_dtype, weight_file.stat().st_size)
    _edit(read_json(first, scratch / "converted.json"), model, placed, first, target, scratch)
    name_by_content(target, read_json(target, scratch / "named.json")["mnn_uuid"])
    return placed


def _edit(
    document: dict[str, Any], model: onnx.ModelProto, placed: list[MnnLayer], first: Path, target: Path, scratch: Path
) -> None:
    """Turn placeholders into convolutions and rounded numbers into exact ones, and write `target`."""
    layers = {one.layer.name: one for one in placed}
    nodes = {node.output[0]: node for node in model.graph.node}
    constants, words, editor = _constants(model), words_of(first), Editor(document)
    for op in document["oplists"]:
        if op["type"] == "Extra":
            node = nodes.get(op["name"])
            if node is None or node.op_type != "Linear":
                kind = (op.get("main") or {}).get("type")
                raise ConvertError(f"MNN's converter does not know the operator {kind} of '{op['name']}'.")
            layer = layers[node.name]
            editor.linear(node.name, op, layer, [-1, layer.layer.n])
        else:
            _mend(op, nodes, constants, words)
            editor.ops.append(op)
    document["oplists"] = editor.ops
    write_json(document, target, scratch / "edited.json")


def _constants(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """Values by the name of their tensor: initializers, and what Constant nodes hold."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors |= {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    return {name: onnx.numpy_helper.to_array(tensor) for name, tensor in tensors.items()}


def _mend(op: dict[str, Any], nodes: dict[str, onnx.NodeProto], constants: dict[str, npt.NDArray[Any]], words: Words) -> None:
    """Undo what the converter and its JSON form change: a norm's epsilon, the kind of GELU, digits of floats."""
    name, main = op["name"], op.get("main") or {}
    if op["type"] == "LayerNorm" and name in nodes:
        main["epsilon"] = next((a.f for a in nodes[name].attribute if a.name == "epsilon"), 1e-5)
    if op["type"] == "UnaryOp" and main["opType"] == "GELU" and _has_erf(name, nodes):
        main["opType"] = "GELU_STANDARD"  # the converter takes the approximation by tanh for both
    for field in ("float32s", "gamma", "beta", "weight", "bias"):
        if isinstance(main.get(field), list) and main[field] and isinstance(main[field][0], float):
            main[field] = exact_values(name, np.array(main[field]), constants.get(name), words)


def _has_erf(output: str, nodes: dict[str, onnx.NodeProto]) -> bool:
    """Whether an output of GELU is computed by the error function: a few steps before it there is one."""
    edge = {output}
    for _ in range(GELU_STEPS):
        makers = [nodes[name] for name in edge if name in nodes]
        if any(node.op_type == "Erf" or _is_exact_gelu(node) for node in makers):
            return True
        edge = {name for node in makers for name in node.input}
    return False


def _is_exact_gelu(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gelu" and all(a.s != b"tanh" for a in node.attribute)
