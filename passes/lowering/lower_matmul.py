"""MatMulNBits over any shape -> a bare Linear node over rows, between two Reshapes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.build import add_node, integers
from lowbit.passes.graph.quantized_ops import DOMAIN, quantized_matmuls


class LowerMatmul(Pass):
    """Replace every quantized MatMul, whatever the rank of its input, by a placeholder named after the layer.

    x [..., K] is reshaped to [rows, K], padded with zeros to whole blocks where they do not divide K, multiplied to [rows, N]
    and reshaped back to [..., N]. The placeholder has the attributes `ic`, K padded, and `oc`, N; the codes leave the graph:
    they are handed over as they are, not through a converter. Biases stay behind it.
    """

    def apply(self, graph: gs.Graph) -> Outcome:
        found = quantized_matmuls(graph)
        if not found:
            raise PassError("no quantized MatMul found; add quantize_matmul to passes.")
        notes: list[str] = []
        for node, weight in found:
            (n, k), name = weight.source.shape, weight.name
            padded = weight.form.block_count(k) * weight.form.block_size
            x, y = node.inputs[0], node.outputs[0]
            node.outputs.clear()
            rows = add_node(graph, "Reshape", f"{name}.rows", [x, integers(f"{name}.rows_shape", -1, k)])
            if padded != k:
                pads = integers(f"{name}.pads", 0, 0, 0, padded - k)
                rows = add_node(graph, "Pad", f"{name}.padded", [rows, pads], mode="constant")
                notes.append(f"{name}: {k} inputs padded with zeros to {padded}, whole blocks of {weight.form.block_size}")
            product = gs.Variable(f"{name}.product", np.float32)
            graph.nodes.append(gs.Node("Linear", name, {"ic": padded, "oc": n}, [rows], [product], domain=DOMAIN))
            shape = add_node(graph, "Shape", f"{name}.shape", [x], np.int64)
            bounds = integers(f"{name}.first", 0), integers(f"{name}.last", -1)
            leading = add_node(graph, "Slice", f"{name}.leading", [shape, *bounds], np.int64)
            whole = add_node(graph, "Concat", f"{name}.whole", [leading, integers(f"{name}.n", n)], np.int64, axis=0)
            graph.nodes.append(gs.Node("Reshape", f"{name}.y", {}, [product, whole], [y]))
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return Outcome(tuple(weight.name for _, weight in found), notes=tuple(notes))
