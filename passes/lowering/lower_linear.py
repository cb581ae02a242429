"""MatMulNBits with its codes and bias -> a bare Linear node that another engine fills."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.build import add_node, integers
from lowbit.passes.graph.decoder import find_linears
from lowbit.passes.graph.quantized_ops import DOMAIN


class LowerLinear(Pass):
    """Replace every quantized MatMul and the bias behind it by a placeholder named after the layer.

    The placeholder has one input [..., K], one output [..., N] called `<layer>.y` (an
    output of the graph keeps its name) and the attributes `ic` = K
    and `oc` = N. The codes leave the graph: they are handed over as they are, not through a converter. Where
    blocks do not divide K, its input is padded with zeros to whole blocks, which changes no product.
    """

    def apply(self, graph: gs.Graph) -> Outcome:
        linears = find_linears(graph)
        if not linears:
            raise PassError("no quantized MatMul found; add quantize_matmul to passes.")
        notes: list[str] = []
        for name, linear in linears.items():
            n, k = linear.weight.source.shape
            y = linear.y
            maker = y.inputs[0]
            x = linear.node.inputs[0]
            maker.outputs.clear()
            linear.node.outputs.clear()
            form = linear.weight.form
            padded = form.block_count(k) * form.block_size
            if padded != k:
                x = _pad(graph, name, x, padded - k)
                notes.append(f"{name}: {k} inputs padded with zeros to {padded}, whole blocks of {form.block_size}")
            if y not in graph.outputs:
                y.name = f"{name}.y"
            graph.nodes.append(gs.Node("Linear", name, {"ic": padded, "oc": n}, [x], [y], domain=DOMAIN))
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return Outcome(tuple(linears), notes=tuple(notes))


def _pad(graph: gs.Graph, name: str, x: gs.Tensor, count: int) -> gs.Tensor:
    """Pad x [1, tokens, K] with `count` zeros after its last axis."""
    pads = integers(f"{name}.pads", 0, 0, 0, 0, 0, count)
    return add_node(graph, "Pad", f"{name}.padded", [x, pads], mode="constant")
