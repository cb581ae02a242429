"""MatMulNBits over any shape -> a bare Linear node over rows, between two Reshapes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, PassError
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

            def add(op: str, part: str, inputs: list[gs.Tensor], name: str = name, **attrs: object) -> gs.Tensor:
                output = gs.Variable(f"{name}.{part}", np.float32)
                graph.nodes.append(gs.Node(op, output.name, attrs, inputs, [output]))
                return output

            def numbers(part: str, *values: int, name: str = name) -> gs.Constant:
                return gs.Constant(f"{name}.{part}", np.array(values, np.int64))

            rows = add("Reshape", "rows", [x, numbers("rows_shape", -1, k)])
            if padded != k:
                rows = add("Pad", "padded", [rows, numbers("pads", 0, 0, 0, padded - k)], mode="constant")
                notes.append(f"{name}: {k} inputs padded with zeros to {padded}, whole blocks of {weight.form.block_size}")
            product = gs.Variable(f"{name}.product", np.float32)
            graph.nodes.append(gs.Node("Linear", name, {"ic": padded, "oc": n}, [rows], [product], domain=DOMAIN))
            shape = add("Shape", "shape", [x])
            leading = add("Slice", "leading", [shape, numbers("first", 0), numbers("last", -1)])
            shape.dtype = leading.dtype = np.int64
            whole = add("Concat", "whole", [leading, numbers("n", n)], axis=0)
            whole.dtype = np.int64
            graph.nodes.append(gs.Node("Reshape", f"{name}.y", {}, [product, whole], [y]))
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return Outcome(tuple(weight.name for _, weight in found), notes=tuple(notes))
