"""What a folder takes on the disk, before there is one."""

from __future__ import annotations

from typing import ClassVar

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint


class Sizes:
    """Bytes of a folder with an ONNX model. An engine that stores something otherwise overrides what differs.

    Attributes:
        graph_per_layer: bytes that the graph takes at most for each quantized layer; measured on the demo are 7.8 kB.
    """

    graph_per_layer: ClassVar[int] = 10_000

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def weight(self, weight: QuantizedWeight) -> int:
        """Bytes of a quantized weight."""
        return sum(part.nbytes for part in weight.parts.values())

    def tables(self) -> int:
        """Bytes of tables that are no weights of the checkpoint."""
        return 0

    def side_files(self) -> int:
        """Bytes of tokenizer and configuration."""
        return sum(file.stat().st_size for file in self.checkpoint.side_files().values())
