"""A folder of onnxruntime-genai -> a chat, in its own loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.chat_engine import TokenizedEngine


class GenaiChat(TokenizedEngine):
    """onnxruntime-genai's generator, which holds the cache."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        import onnxruntime_genai

        super().__init__(checkpoint)
        self.genai, self.model = onnxruntime_genai, onnxruntime_genai.Model(str(folder))
        self.reset()

    def forward(self, ids: list[int]) -> npt.NDArray[np.float32]:
        self.generator.append_tokens(np.array(ids, np.int32))
        return np.array(self.generator.get_output("logits"), np.float32)[0, -1]

    def reset(self) -> None:
        self.generator = self.genai.Generator(self.model, self.genai.GeneratorParams(self.model))
