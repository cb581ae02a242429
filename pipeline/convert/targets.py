"""The engines that a result can be handed to, by their names in recipes."""

from __future__ import annotations

from pipeline.convert.genai_folder import OnnxruntimeGenai
from pipeline.convert.mnn_folder import Mnn
from pipeline.convert.mnn_llm_folder import MnnLlm
from pipeline.convert.target import Target

TARGETS: dict[str, type[Target]] = {"mnn": Mnn, "mnn-llm": MnnLlm, "onnxruntime-genai": OnnxruntimeGenai}
