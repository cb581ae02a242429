"""Weights around the residual stream -> the same function with the stream rotated, outliers spread over all channels."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.decoder import Norm, expect, find_plain_norms, need
from lowbit.passes.graph.match import Bias, MatmulWeight, behind, bias_of, matmul_weight, producer, readers
from lowbit.passes.quant.hadamard import Rotation, hadamard_factors
from lowbit.passes.quant.rotated_weight import TurnedWeight
from lowbit.passes.quant.weights import ArrayWeight, Weight, weight_of


class RotateResidual(Pass):
    """Rotate the residual stream, and the heads of values, by Hadamard matrices that are folded into weights.

    Nothing of it is left at run time: R1 and R2 of QuaRot and SpinQuant (Ashkboos et al., arXiv:2404.00456; Liu et al.,
    arXiv:2405.16406). RMSNorm commutes with a rotation once its weight is folded into the layers behind it. Comes before
    quantization; the embedding becomes float32: follow it with `narrow_embedding: {dtype: bf16}`. Refused: whatever else
    reads or writes the stream.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the rotation's signs."""
    heads: bool = True
    """Whether each head of v_proj and o_proj is rotated as well."""

    @property
    def plain(self) -> None:
        return None

    @property
    def keeps_shapes(self) -> bool:
        return True

    def apply(self, graph: gs.Graph) -> Outcome:
        norms = [norm for norm in find_plain_norms(graph) if not norm.gamma.name.endswith(("q_norm.weight", "k_norm.weight"))]
        if not norms:
            raise PassError("no RMSNorm found: not a decoder that this pass knows.")
        stream = Rotation(int(norms[0].gamma.shape[0]), self.seed)
        hadamard_factors(stream.size)
        changes = _Changes(graph)
        for norm in norms:
            self._fold(changes, norm, stream)
        for writer in _writers(norms):
            if writer.op == "Gather":
                changes.look_up(writer, stream)
            elif (bias := bias_of(writer)) is not None:
                changes.bias(bias, stream)
            else:
                changes.linear(writer).turn_out = stream
        if self.heads:
            self._turn_heads(changes, graph)
        changes.apply()
        graph.cleanup().toposort()
        return Outcome(tuple(sorted(changes.names)))

    def _fold(self, changes: _Changes, norm: Norm, stream: Rotation) -> None:
        """Move a norm's weight into the layers that read it, and turn their inputs."""
        for reader in [node for node in readers(norm.y) if node.op != "Shape"]:
            need(
                reader.op == "MatMul" and matmul_weight(reader) is not None,
                f"{norm.gamma.name}: '{reader.name}' ({reader.op}) reads the norm, only MatMuls by weights may.",
            )
            linear = changes.linear(reader)
            linear.scale, linear.turn_in = weight_of(norm.gamma), stream
        changes.ones(norm)

    def _turn_heads(self, changes: _Changes, graph: gs.Graph) -> None:
        for past in [t for t in graph.inputs if t.name.startswith("past_key_values.") and t.name.endswith(".value")]:
            heads = Rotation(int(past.shape[3]), self.seed)
            hadamard_factors(heads.size)
            where = f"model.layers.{past.name.split('.')[1]}.self_attn"
            value, output = (changes.by_name(f"{where}.{part}_proj") for part in "vo")
            value.turn_out, output.turn_in = heads, heads
            bias = next((bias for node in readers(value.node.outputs[0]) if (bias := bias_of(node)) is not None), None)
            if bias is not None:
                changes.bias(bias, heads)


def _writers(norms: list[Norm]) -> list[gs.Node]:
    """The nodes that write to the residual stream: the lookup, MatMuls by weights, and Adds of their biases.

    Raises:
        PassError: something else writes to it or reads from it.
    """
    writers: dict[int, gs.Node] = {}
    seen: set[int] = set()
    todo = [behind(norm.x) for norm in norms]
    while todo:
        tensor = todo.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for reader in readers(tensor):
            known = reader.op in ("Add", "Pow", "Mul", "Shape")
            need(known, f"'{reader.name}' ({reader.op}) reads the residual stream '{tensor.name}'.")
        maker = producer(tensor)
        if maker is None or maker.op not in ("Add", "Gather", "MatMul"):
            raise PassError(f"'{tensor.name}' is not a sum of layers' outputs.")
        bias = bias_of(maker)
        if maker.op == "Add" and bias is None:
            todo += [behind(t) for t in maker.inputs]
            continue
        writers[id(maker)] = maker
        if bias is not None:
            maker = producer(bias.x)
            if maker is None or maker.op != "MatMul":
                raise PassError(f"'{tensor.name}' is not a layer's output with its bias.")
            writers[id(maker)] = maker
        need(maker.op == "Gather" or matmul_weight(maker) is not None, f"'{maker.name}' does not multiply by a weight.")
    return list(writers.values())


class _Linear:
    """A MatMul whose weight is to change."""

    def __init__(self, node: gs.Node, operand: MatmulWeight) -> None:
        self.node, self.source = node, operand.weight
        self.name = "lm_head.weight" if operand.shared else operand.constant.name
        self.scale: Weight | None = None
        self.turn_in: Rotation | None = None
        self.turn_out: Rotation | None = None


class _Changes:
    """Collected first, since a layer may be turned on both sides; applied when everything has been proven."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.linears: dict[int, _Linear] = {}
        self.inputs: list[tuple[gs.Node, int, gs.Constant]] = []

    @property
    def names(self) -> list[str]:
        return [constant.name for _, _, constant in self.inputs] + [linear.name for linear in self.linears.values()]

    def linear(self, node: gs.Node) -> _Linear:
        if id(node) not in self.linears:
            self.linears[id(node)] = _Linear(node, expect(matmul_weight(node), f"'{node.name}' does not multiply by a weight."))
        return self.linears[id(node)]

    def by_name(self, name: str) -> _Linear:
        linear = next((linear for linear in self.linears.values() if linear.name == f"{name}.weight"), None)
        return expect(linear, f"{name}: no MatMul by this weight lies between norms and the residual stream.")

    def look_up(self, node: gs.Node, rotation: Rotation) -> None:
        table = behind(node.inputs[0])
        need(isinstance(table, gs.Constant), f"'{node.name}' does not look up a constant table.")
        self.inputs.append((node, 0, gs.Constant(table.name, TurnedWeight(weight_of(table), turn_in=rotation))))

    def bias(self, bias: Bias, rotation: Rotation) -> None:
        turned = rotation.turn(weight_of(bias.constant).load().astype(np.float32))
        self.inputs.append((bias.node, bias.place, gs.Constant(bias.constant.name, ArrayWeight(turned))))

    def ones(self, norm: Norm) -> None:
        (scaled,) = readers(norm.gamma)
        place = next(i for i, t in enumerate(scaled.inputs) if behind(t) is norm.gamma)
        plain = gs.Constant(norm.gamma.name, ArrayWeight(np.ones(norm.gamma.shape, np.float32)))
        self.inputs.append((scaled, place, plain))

    def apply(self) -> None:
        for node, place, constant in self.inputs:
            node.inputs[place] = constant
        for linear in self.linears.values():
            turned = TurnedWeight(linear.source, linear.scale, linear.turn_in, linear.turn_out)
            columns = gs.Variable(f"{linear.name}.columns", np.float32, list(turned.shape[::-1]))
            constant = gs.Constant(linear.name, turned)
            self.graph.nodes.append(gs.Node("Transpose", columns.name, {"perm": [1, 0]}, [constant], [columns]))
            linear.node.inputs[1] = columns
