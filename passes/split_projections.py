"""One MatMul that makes several projections (qkv_proj, gate_up_proj) -> one MatMul for each."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.build import add_node
from lowbit.passes.graph.match import constant_value, matmul_weight, readers
from lowbit.passes.quant.weights import SlicedWeight, Weight, widened

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class SplitProjections(Pass):
    """Give every part of a fused projection a layer of its own, as Llama has them; the numbers stay the same.

    Phi-3 keeps queries, keys and values in one weight, gate and up in another, and cuts their products apart. Cutting the rows
    of the weight instead lets each part have its own bits, and lets engines that rotate queries and keys find them. Put it in
    front of quantize_matmul.
    """

    @property
    def keeps_shapes(self) -> bool:
        return True  # sizes, at least: where to cut is in the products, which a plan does not know

    def apply(self, graph: gs.Graph) -> Outcome:
        rewritten: list[str] = []
        for node in list(graph.nodes):
            if node.op != "MatMul" or (operand := matmul_weight(node)) is None:
                continue
            prefix, _, kind = operand.constant.name.removesuffix(".weight").rpartition(".")
            if kind not in PARTS:
                continue
            cuts = _cuts(node, operand.constant.name, kind, operand.weight.shape[0])
            for part, (cut, start, stop) in zip(PARTS[kind], cuts, strict=True):
                _product(graph, f"{prefix}.{part}", node.inputs[0], SlicedWeight(operand.weight, start, stop), cut)
                rewritten.append(f"{prefix}.{part}")
        if not rewritten:
            raise PassError(f"no MatMul by a weight called {' or '.join(PARTS)}.")
        graph.cleanup().toposort()
        return Outcome(tuple(rewritten))


def _cuts(node: gs.Node, name: str, kind: str, n: int) -> list[tuple[gs.Node, int, int]]:
    """The Slices of a product [..., n], from the first column to the last, with what each takes."""
    slices = [reader for reader in readers(node.outputs[0]) if reader.op != "Shape"]
    if any(reader.op != "Slice" for reader in slices) or len(slices) != len(PARTS[kind]):
        raise PassError(
            f"{name}: its product is read by {sorted(reader.op for reader in slices)}, expected {len(PARTS[kind])} Slices."
        )
    if kind == "gate_up_proj":  # halves, cut by arithmetic on its shape
        first, second = sorted(slices, key=lambda cut: constant_value(cut.inputs[1]) is None)
        if second.inputs[1] is not first.inputs[2]:
            raise PassError(f"{name}: '{second.name}' does not begin where '{first.name}' ends.")
        return [(first, 0, n // 2), (second, n // 2, n)]
    cuts = [(cut, _bound(cut, 1, name, n), _bound(cut, 2, name, n)) for cut in slices]
    cuts.sort(key=lambda cut: cut[1])
    starts, stops = [start for _, start, _ in cuts], [stop for _, _, stop in cuts]
    if [*starts, n] != [0, *stops]:
        raise PassError(f"{name}: its product is not cut into parts that follow each other.")
    return cuts


def _bound(cut: gs.Node, place: int, name: str, n: int) -> int:
    value = constant_value(cut.inputs[place])
    if value is None:
        raise PassError(f"{name}: its product is cut at places that are not constant.")
    return min(int(value.reshape(-1)[0]), n)


def _product(graph: gs.Graph, name: str, x: gs.Tensor, weight: Weight, cut: gs.Node) -> None:
    """Add y = x @ weight.T in place of a Slice."""
    turned = add_node(graph, "Transpose", f"{name}.turned", [widened(graph, f"{name}.weight", weight)], perm=[1, 0])
    (y,) = cut.outputs
    cut.outputs.clear()
    graph.nodes.append(gs.Node("MatMul", f"/{name.replace('.', '/')}/MatMul", {}, [x, turned], [y]))
