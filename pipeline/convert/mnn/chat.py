"""A folder of MNN's LLM runtime -> a chat, in the runtime as it is shipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.chat_engine import TokenizedEngine
from lowbit.pipeline.errors import PipelineError


class MnnChat(TokenizedEngine):
    """Reads by MNN's own tokenizer, writes by the checkpoint's.

    Raises:
        PipelineError: MNN does not open the folder.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        with _quiet():
            import MNN.llm as llm  # the package; `from MNN import llm` is the bare extension

            self.model = llm.create(str(folder / "config.json"))
            if self.model is None:
                raise PipelineError(f"{folder}: MNN does not open it. Run the recipe again.")
            self.model.set_config({"use_template": False, "thread_num": os.cpu_count()})
            self.model.load()

    def encode(self, text: str) -> list[int]:
        return list(self.model.tokenizer_encode(text))

    def forward(self, ids: list[int]) -> npt.NDArray[np.float32]:
        output = self.model.forward(ids)
        return np.array(output.read(), np.float32).reshape(-1, output.shape[-1])[-1]

    def reset(self) -> None:
        self.model.reset()


@contextmanager
def _quiet() -> Iterator[None]:
    """What a library prints from C while it loads, into nothing."""
    stdout, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nothing)
