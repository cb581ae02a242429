"""The parts of a decoder graph as optimum exports it, each found by weight names and proven by its nodes.

A part is anchored on weights, and every node between its ends is checked before anything is replaced; what
does not fit raises `PassError` with the node and the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.base import PassError
from lowbit.passes.graph.match import SAME_VALUE, behind, bias_of, constant_value, producer, readers, repeats
from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import weight_of

T = TypeVar("T")

VIEWS = SAME_VALUE | {"Unsqueeze", "Reshape", "Expand", "Transpose"}
"""Operators that move values about without changing any."""


def need(condition: object, message: str) -> None:
    """Raise `PassError` unless the condition holds."""
    if not condition:
        raise PassError(message)


def expect(value: T | None, message: str) -> T:
    """The value, which must be there; raise `PassError` if it is None."""
    if value is None:
        raise PassError(message)
    return value


@dataclass(frozen=True, eq=False)
class Linear:
    """A quantized MatMul and the bias behind it: x [..., K] -> y [..., N]."""

    weight: QuantizedWeight
    node: gs.Node
    bias: gs.Constant | None
    x: gs.Tensor
    y: gs.Tensor


def find_linears(graph: gs.Graph) -> dict[str, Linear]:
    """Every quantized MatMul by layer name."""
    linears = {}
    for node, weight in quantized_matmuls(graph):
        y = node.outputs[0]
        bias = bias_of(y.outputs[0]) if len(y.outputs) == 1 else None
        if bias is None or not bias.constant.name.endswith(".bias"):
            linears[weight.name] = Linear(weight, node, None, node.inputs[0], y)
        else:
            linears[weight.name] = Linear(weight, node, bias.constant, node.inputs[0], bias.node.outputs[0])
    return linears


def refuse_float_layers(graph: gs.Graph) -> None:
    """Raise `PassError` if a MatMul multiplies by a float weight."""
    for node in graph.nodes:
        if node.op == "MatMul" and (weight := constant_matrix(node.inputs[1])) is not None:
            name = weight.removesuffix(".weight")
            raise PassError(
                f"'{node.name}' multiplies by the float weight '{name}'. MNN gets codes only: quantize it too, with "
                f"quantize_matmul {{bits: 8, include: ['{name}']}} if it must stay accurate."
            )


def constant_matrix(tensor: gs.Tensor) -> str | None:
    """The name of the constant [rows, columns] behind views and casts, or None."""
    tensor = behind(tensor, SAME_VALUE | {"Transpose"})
    return tensor.name if isinstance(tensor, gs.Constant) and len(tensor.shape) == 2 and min(tensor.shape) > 1 else None


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm: y = x / sqrt(mean(x^2) + epsilon) * (offset + gamma) (Zhang and Sennrich, arXiv:1910.07467).

    Attributes:
        offset: 1 in Gemma's norms, else 0.
    """

    gamma: gs.Constant
    offset: float
    epsilon: float
    x: gs.Tensor
    y: gs.Tensor

    def factors(self) -> npt.NDArray[np.float32]:
        """What normed values are multiplied by, float32 [features]."""
        return np.float32(self.offset) + weight_of(self.gamma).load().astype(np.float32)


def find_norms(graph: gs.Graph) -> list[Norm]:
    """Every RMSNorm that is spelled out, by its weight `*norm.weight`."""
    gammas = [
        t
        for t in graph.tensors().values()
        if isinstance(t, gs.Constant) and t.name.endswith("norm.weight") and len(t.shape) == 1
    ]
    fused = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
    return [_norm(gamma) for gamma in gammas if not any(node.op in fused for node in readers(gamma))]


def find_plain_norms(graph: gs.Graph) -> list[Norm]:
    """Every RMSNorm, for passes that write into its weight: none may multiply by 1 + weight."""
    norms = find_norms(graph)
    for norm in norms:
        need(
            not norm.offset,
            f"{norm.gamma.name}: this norm multiplies by 1 + weight, as Gemma's; only plain ones can be folded.",
        )
    return norms


def _norm(gamma: gs.Constant) -> Norm:
    name = gamma.name
    factor, offset = _factor(gamma)
    scaled = readers(factor)
    need(len(scaled) == 1 and scaled[0].op == "Mul", f"{name}: read by {[n.op for n in scaled]}, expected one Mul.")
    normed = producer(behind(next(t for t in scaled[0].inputs if behind(t) is not factor)))
    if normed is None or normed.op != "Mul":
        raise PassError(f"{name}: no Mul by the reciprocal root in front of it.")
    roots = [t for t in normed.inputs if (n := producer(behind(t))) is not None and n.op in ("Div", "Reciprocal")]
    need(len(roots) == 1, f"{name}: '{normed.name}' does not multiply by one reciprocal root.")
    x = behind(next(t for t in normed.inputs if t is not roots[0]))
    return Norm(gamma, offset, _epsilon(name, roots[0], x), x, scaled[0].outputs[0])


def _factor(gamma: gs.Constant) -> tuple[gs.Tensor, float]:
    """What normed values are multiplied by, offset + gamma, and the offset."""
    adds = readers(gamma)
    if len(adds) != 1 or adds[0].op != "Add":
        return gamma, 0.0
    others = [constant_value(t) for t in adds[0].inputs if behind(t) is not gamma]
    offsets = [value for value in others if value is not None and value.size == 1]
    need(len(offsets) == 1, f"{gamma.name}: '{adds[0].name}' does not add one constant to it.")
    return adds[0].outputs[0], float(offsets[0].reshape(-1)[0])


def _epsilon(name: str, root: gs.Tensor, x: gs.Tensor) -> float:
    """Prove root = 1 / sqrt(mean(x^2) + epsilon) over the last axis; returns epsilon."""
    reciprocal = made_by(root, name, "Div", "Reciprocal")
    if reciprocal.op == "Div":
        dividend = constant_value(reciprocal.inputs[0])
        need(dividend is not None and float(dividend.reshape(-1)[0]) == 1.0, f"{name}: '{reciprocal.name}' is not 1 / root.")
    shifted = made_by(made_by(reciprocal.inputs[-1], name, "Sqrt").inputs[0], name, "Add")
    epsilons = [v for t in shifted.inputs if (v := constant_value(t)) is not None]
    need(len(epsilons) == 1, f"{name}: '{shifted.name}' does not add one constant epsilon.")
    mean = made_by(next(t for t in shifted.inputs if constant_value(t) is None), name, "ReduceMean")
    axes = mean.attrs["axes"] if "axes" in mean.attrs else constant_value(mean.inputs[1])
    need(list(np.asarray(axes).reshape(-1)) == [-1], f"{name}: '{mean.name}' averages over axes {axes}, expected -1.")
    square = made_by(mean.inputs[0], name, "Pow")
    exponent = constant_value(square.inputs[1])
    need(exponent is not None and float(exponent.reshape(-1)[0]) == 2.0, f"{name}: '{square.name}' is not a square.")
    need(behind(square.inputs[0]) is x, f"{name}: the mean square is of another tensor than is normed.")
    return float(epsilons[0].reshape(-1)[0])


def made_by(tensor: gs.Tensor, where: str, *ops: str) -> gs.Node:
    """The node that makes a tensor, behind casts; it must be one of `ops`."""
    node = producer(behind(tensor))
    if node is None or node.op not in ops:
        raise PassError(f"{where}: expected {' or '.join(ops)}, found {'an input' if node is None else node.op}.")
    return node


def leaves_of(tensor: gs.Tensor, stops: list[gs.Tensor]) -> dict[str, gs.Tensor]:
    """What a tensor is computed from: constants, inputs and `stops`; shape arithmetic does not count."""
    ends = {id(repeated) for stop in stops for repeated in repeats(stop)}
    leaves: dict[str, gs.Tensor] = {}
    seen: set[int] = set()
    todo = [tensor]
    while todo:
        leaf = todo.pop()
        node = producer(leaf)
        if id(leaf) in ends or node is None:
            leaves[behind(leaf).name] = leaf
        elif id(node) not in seen:
            seen.add(id(node))
            if node.op not in ("Shape", "ConstantOfShape", "Range"):
                todo += list(node.inputs)
    return leaves
