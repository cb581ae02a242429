"""What a folder of onnxruntime-genai takes."""

from __future__ import annotations

from typing import ClassVar

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.sizes import Sizes


class GenaiSizes(Sizes):
    """Bytes of the folder `genai`: its graph takes 5.0 kB a layer on the demo.

    Args:
        folded: whether three-bit codes are stored as nibbles.
    """

    graph_per_layer: ClassVar[int] = 7_000

    def __init__(self, checkpoint: Checkpoint, folded: bool) -> None:
        super().__init__(checkpoint)
        self.folded = folded

    def weight(self, weight: QuantizedWeight) -> int:
        codes = weight.parts["codes"].nbytes
        return super().weight(weight) + (codes // 3 if self.folded and weight.form.bits == 3 else 0)

    def tables(self) -> int:
        """What onnxruntime's attention rotates by: cos and sin for every position, float32."""
        config = self.checkpoint.config
        head_dim = config.get("head_dim") or int(config.get("hidden_size", 0)) // (config.get("num_attention_heads") or 1)
        kinds = 2 if config.get("model_type") == "gemma3_text" else 1
        rotated = int(head_dim * config.get("partial_rotary_factor", 1.0))
        return kinds * 4 * int(config.get("max_position_embeddings") or 0) * rotated
