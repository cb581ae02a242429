"""The last product of a decoder: hidden states -> logits, by rows of the output table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.graph.match import behind, constant_value, matmul_weight, producer
from lowbit.passes.quant.weights import Weight, weight_of
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.runtime.shared_session import widened_values

ELEMENTWISE = {"Mul": np.multiply, "Div": np.divide, "Tanh": np.tanh}
"""What may follow the product that makes logits."""
HELD_BYTES = 256 << 20
"""A table of at most so many bytes in float32 is widened or dequantized once, not for every batch."""


@dataclass(frozen=True)
class Head:
    """How an exported decoder makes its logits: hidden states times a table [vocabulary, hidden], then what follows.

    Attributes:
        after: numpy's functions and their further operands; Granite divides logits, Gemma 2 caps them by a tanh.
    """

    hidden: gs.Tensor
    table: Weight
    after: list[tuple[np.ufunc, tuple[np.float32, ...]]]

    def product(self) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
        """A function from hidden states [batch, tokens, hidden] to logits [batch, tokens, vocabulary], both float32.

        The product goes by rows of the table: widened whole, one of a large model would be the largest thing in memory.
        """
        count, width = self.table.shape
        small = 4 * count * width <= HELD_BYTES
        held = [(0, widened_values({"table": self.table})["table"])] if small else None

        def multiply(hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            logits = np.empty((*hidden.shape[:2], count), np.float32)
            flat, states = logits.reshape(-1, count), hidden.reshape(-1, width)
            for row, rows in held or self.table.chunks():
                np.matmul(states, rows.astype(np.float32, copy=False).T, out=flat[:, row : row + len(rows)])
            for function, factor in self.after:
                function(logits, *factor, out=logits)
            return logits

        return multiply


def scaled_logits(graph: gs.Graph) -> bool:
    """Whether a decoder's logits are more than a product with a weight."""
    return bool(head_of(graph).after)


def head_of(graph: gs.Graph) -> Head:
    """The head of a graph.

    Raises:
        PipelineError: the logits are made in another way.
    """
    node = producer(next(t for t in graph.outputs if t.name == "logits"))
    after: list[tuple[np.ufunc, tuple[np.float32, ...]]] = []
    while node is not None and node.op in ELEMENTWISE:
        scalars = [value for t in node.inputs[1:] if (value := constant_value(t)) is not None and value.size == 1]
        if len(scalars) != len(node.inputs) - 1:
            break
        after.insert(0, (ELEMENTWISE[node.op], tuple(np.float32(value.reshape(-1)[0]) for value in scalars)))
        node = producer(behind(node.inputs[0]))
    table = None if node is None else _table(node)
    if node is None or table is None:
        raise PipelineError("the logits of the exported graph are not one product with a weight.")
    return Head(node.inputs[0], table, after)


def _table(node: gs.Node) -> Weight | None:
    """The weight [N, K] that a node multiplies by, if it does."""
    if node.op == "FusedMatMul" and isinstance(constant := behind(node.inputs[1]), gs.Constant):
        return weight_of(constant)  # transB: as checkpoints keep it
    operand = matmul_weight(node) if node.op == "MatMul" else None
    return None if operand is None else operand.weight
