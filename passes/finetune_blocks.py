"""Quantized MatMuls -> the same ones, their codes and scales to be trained against the float model."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import onnx_graphsurgeon as gs
from pydantic import Field

from lowbit.passes.base import Outcome, Pass, PassError, Phase
from lowbit.passes.graph.names import select
from lowbit.passes.graph.quantized_ops import quantized_matmuls, replace_weight


class FinetuneBlocks(Pass):
    """Train the codes and scales of quantized layers, one decoder block at a time against the float block's output.

    The first phase of EfficientQAT (Chen et al., arXiv:2407.11062): rounding is trained through, its gradient passed straight;
    integer zero points stay. Then, if asked, all blocks and lm_head are trained together on the KL divergence from the float
    model. It begins with the codes that `quantize_matmul` chose, so it comes after it, and reads the text of `calibrate:`.
    """

    optimizer: Literal["adam", "sign"] = "adam"
    """`sign`: steps of one length against the signs of gradients, as AutoRound's SignSGD, falling linearly to zero."""
    epochs: Annotated[int, Field(ge=0)] = 3
    """How often each block sees all windows."""
    end_to_end: Annotated[int, Field(ge=0)] = 0
    """How often the whole model sees all windows afterwards: the float model and the trained one must fit into memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.005
    """Of the codes, in steps of a code."""
    scale_learning_rate: Annotated[float, Field(gt=0)] = 0.002
    """Of the logarithms of the scales, and of free zero points."""
    batch: Annotated[int, Field(ge=1)] = 8
    """Windows of one step."""
    seed: Annotated[int, Field(ge=0)] = 0
    """For the order of the windows."""
    threads: Annotated[int, Field(ge=1)] = 2
    """Threads that torch computes with. Sums are split between them, so another number gives other last bits."""
    include: tuple[str, ...] = ("*",)
    """Globs on layer names."""
    exclude: tuple[str, ...] = ()
    """Globs on layer names to leave as they are; stronger than `include`."""

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset({"training"})

    @property
    def plain(self) -> None:
        return None

    def apply(self, graph: gs.Graph) -> Outcome:
        matmuls = {weight.name: (node, weight) for node, weight in quantized_matmuls(graph)}
        if not matmuls:
            raise PassError("no quantized MatMul found; put quantize_matmul before it.")
        if any(weight.training is not None for _, weight in matmuls.values()):
            raise PassError("finetune_blocks is here twice; all layers are trained together, so give it one entry.")
        skipped = select(list(matmuls), self.include, self.exclude, also=set())
        rewritten = tuple(name for name in matmuls if name not in skipped)
        for name in rewritten:
            node, weight = matmuls[name]
            replace_weight(node, weight, replace(weight, training=self))
        return Outcome(rewritten, skipped)
