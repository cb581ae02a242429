"""Looking around in a graph: through nodes that change no value, back to constants, forward to readers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
    found = [tensor]
    for one in found:
        found += [node.outputs[0] for node in one.outputs if node.op in SAME_VALUE]
    return found


def readers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read a tensor, directly or through casts and identities, each once."""
    found: dict[int, gs.Node] = {}
    for one in repeats(tensor):
        for node in one.outputs:
            if node.op not in SAME_VALUE:
                found[id(node)] = node
    return list(found.values())


def constant_value(tensor: gs.Tensor) -> np.ndarray | None:
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


def replace(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of `old`, or of a cast of it, read `new` instead."""
    for tensor in repeats(old):
        for reader in list(tensor.outputs):
            reader.inputs = [new if one is tensor else one for one in reader.inputs]
