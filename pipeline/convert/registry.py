"""The engines that a result can be handed to, by their names in recipes."""

from __future__ import annotations

from lowbit.pipeline.convert.base import Target
from lowbit.pipeline.convert.genai.llm import OnnxruntimeGenai
from lowbit.pipeline.convert.mnn.llm import MnnLlm
from lowbit.pipeline.convert.mnn.tensors import Mnn

TARGETS: dict[str, type[Target]] = {"mnn": Mnn, "mnn-llm": MnnLlm, "onnxruntime-genai": OnnxruntimeGenai}
