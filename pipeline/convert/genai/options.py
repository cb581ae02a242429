"""What recipes say about onnxruntime-genai."""

from __future__ import annotations

from typing import ClassVar, Literal

from lowbit.pipeline.recipe.sections import Convert


class GenaiOptions(Convert):
    """The folder `genai`, with attention and norms in onnxruntime's own operators, for models that generate text."""

    folder: ClassVar[str] = "genai"
    made_by: ClassVar[str] = "lowbit.pipeline.convert.genai.llm"

    target: Literal["onnxruntime-genai"] = "onnxruntime-genai"
    """onnxruntime-genai's loop over onnxruntime's kernels."""
    three_bit: Literal["packed", "folded"] = "packed"
    """`packed`: three bits on the disk, unpacked whenever the model is loaded; `folded`: unpacked to nibbles now, four bits on
    the disk, loaded as fast as four bits."""
