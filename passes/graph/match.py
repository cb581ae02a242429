"""Looking around in a graph: through nodes that change no value, back to constants, forward to readers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.quant.weights import TransposedWeight, Weight, weight_of

SAME_VALUE = frozenset({"Cast", "Identity"})
"""Operators that hand their input on; Cast counts because passes look at float tensors only."""


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a tensor; None for constants and graph inputs."""
    return tensor.inputs[0] if tensor.inputs else None


def behind(tensor: gs.Tensor, ops: frozenset[str] = SAME_VALUE) -> gs.Tensor:
    """The tensor that `tensor` repeats, through any chain of `ops`."""
    while (node := producer(tensor)) is not None and node.op in ops:
        tensor = node.inputs[0]
    return tensor


def repeats(tensor: gs.Tensor) -> list[gs.Tensor]:
    """`tensor` and every tensor that repeats it through casts and identities."""
    repeated = [tensor]
    for last in repeated:  # grows as it is walked
        repeated += [node.outputs[0] for node in last.outputs if node.op in SAME_VALUE]
    return repeated


def readers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read a tensor, directly or through casts and identities, each once."""
    nodes = [node for repeated in repeats(tensor) for node in repeated.outputs if node.op not in SAME_VALUE]
    return list({id(node): node for node in nodes}.values())


def constant_value(tensor: gs.Tensor) -> npt.NDArray[Any] | None:
    """The value of a small tensor that depends on constants alone, or None."""
    tensor = behind(tensor)
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    node = producer(tensor)
    if node is None:
        return None
    if node.op == "Constant":
        return np.asarray(node.attrs["value"].values)
    if node.op not in ("Sqrt", "Unsqueeze", "Squeeze"):
        return None
    value = constant_value(node.inputs[0])
    if value is None:
        return None
    return np.sqrt(value) if node.op == "Sqrt" else value.reshape(-1)


@dataclass(frozen=True, eq=False)
class MatmulWeight:
    """The constant right-hand side of a MatMul.

    Attributes:
        constant: where the graph holds it.
        weight: its [N, K] view, out features first.
        shared: whether an embedding reads the same constant (tied weights).
    """

    constant: gs.Constant
    weight: Weight
    shared: bool


def matmul_weight(node: gs.Node) -> MatmulWeight | None:
    """The constant 2-D weight that a MatMul multiplies by, seen through casts, identities and transposes."""
    tensor, transposed = behind(node.inputs[1]), False
    while (maker := producer(tensor)) is not None and maker.op == "Transpose" and maker.attrs.get("perm") == [1, 0]:
        tensor, transposed = behind(maker.inputs[0]), not transposed
    if not isinstance(tensor, gs.Constant) or len(tensor.shape) != 2:
        return None
    weight = weight_of(tensor)
    shared = any(reader.op == "Gather" for reader in readers(tensor))
    return MatmulWeight(tensor, weight if transposed else TransposedWeight(weight), shared)


@dataclass(frozen=True, eq=False)
class Bias:
    """A constant vector that is added to a tensor.

    Attributes:
        node: the Add.
        place: which of its operands the vector is.
    """

    node: gs.Node
    place: int

    @property
    def constant(self) -> gs.Constant:
        """The vector."""
        return behind(self.node.inputs[self.place])

    @property
    def x(self) -> gs.Tensor:
        """What it is added to."""
        return behind(self.node.inputs[1 - self.place])


def bias_of(node: gs.Node | None) -> Bias | None:
    """What a node adds, if it is an Add of one constant vector."""
    if node is None or node.op != "Add":
        return None
    operands = [behind(t) for t in node.inputs]
    places = [i for i, t in enumerate(operands) if isinstance(t, gs.Constant) and len(t.shape) == 1]
    return Bias(node, places[0]) if len(places) == 1 else None


def before_bias(tensor: gs.Tensor) -> tuple[gs.Node | None, Bias | None]:
    """The node that makes a tensor, and the bias that is added to what it makes, where there is one."""
    node = producer(tensor)
    bias = bias_of(node)
    return (node, None) if bias is None else (producer(bias.x), bias)


def replace(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of `old`, or of a cast of it, read `new` instead."""
    for tensor in repeats(old):
        for reader in list(tensor.outputs):
            reader.inputs = [new if operand is tensor else operand for operand in reader.inputs]
