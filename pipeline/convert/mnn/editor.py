"""Editing MNN's graph in its JSON form."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.graph.lowered_ops import ROPES
from lowbit.pipeline.convert.mnn.weights import MnnLayer
from lowbit.pipeline.errors import ConvertError

NHWC = "NHWC"
GAMMAS = {"q_gamma": "q_norm", "k_gamma": "k_norm"}
"""What NormedRoPE calls the weights of its norms, and what MNN's RoPE calls them."""


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
