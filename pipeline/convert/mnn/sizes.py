"""What MNN's folders take."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lowbit.passes.quant.format import ScaleDtype
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.mnn.tokenizer import tokenizer_bytes
from lowbit.pipeline.convert.mnn.weights import MnnLayer
from lowbit.pipeline.convert.sizes import Sizes
from lowbit.pipeline.onnx_io.stored_layer import stored_as_entry


class MnnSizes(Sizes):
    """Bytes of model.mnn and its weights. The graph takes 1.3 kB a layer on the demo."""

    graph_per_layer: ClassVar[int] = 2_000

    def __init__(self, checkpoint: Checkpoint, scale_dtype: ScaleDtype) -> None:
        super().__init__(checkpoint)
        self.scale_dtype = scale_dtype

    def weight(self, weight: QuantizedWeight) -> int:
        return sum(MnnLayer(stored_as_entry(weight, Path()), None, self.scale_dtype, 0).sizes)


class MnnLlmSizes(MnnSizes):
    """The same beside MNN's own tokenizer file."""

    def side_files(self) -> int:
        return len(tokenizer_bytes(self.checkpoint))
