"""What recipes say about MNN's two targets."""

from __future__ import annotations

from typing import ClassVar, Literal

from lowbit.passes.quant.format import ScaleDtype
from lowbit.pipeline.recipe.sections import Convert

MODES = {"memory_high": "memory high", "memory_low": "memory low"}
"""MNN's ways to compute: with weights in float, and with the activations rounded to eight bits as well."""


class MnnLlmOptions(Convert):
    """The folder `mnn` that MNN's LLM runtime opens, for models that generate text."""

    folder: ClassVar[str] = "mnn"
    made_by: ClassVar[str] = "lowbit.pipeline.convert.mnn.llm"
    half_embedding: ClassVar[bool] = True
    free_offsets: ClassVar[bool] = True

    target: Literal["mnn-llm"] = "mnn-llm"
    """MNN's LLM runtime."""
    scale_dtype: ScaleDtype = "fp16"
    """Dtype of scales and offsets in MNN's file. fp16 is exact for weights quantized with scale_dtype: fp16."""


class MnnOptions(Convert):
    """The folder `mnn` with model.mnn, which has the inputs and outputs of the ONNX file, for models that are no decoders."""

    folder: ClassVar[str] = "mnn"
    made_by: ClassVar[str] = "lowbit.pipeline.convert.mnn.tensors"

    target: Literal["mnn"] = "mnn"
    """MNN's engine alone."""
    scale_dtype: ScaleDtype = "fp16"
    """Dtype of scales and offsets in MNN's file. fp16 is exact for weights quantized with scale_dtype: fp16."""
