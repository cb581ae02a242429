"""Within a process of its own: an LLM folder in MNN's runtime (see engine_worker.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.pipeline.checkpoint.chat_template import Conversation
from lowbit.pipeline.convert.engine_worker import serve


class MnnSession:
    """A folder that MNN has opened; `settings` say how it computes."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import MNN.llm as llm  # the package; `from MNN import llm` is the bare extension

        self.model = llm.create(str(folder / "config.json"))
        # all_logits only to measure: shipped true, it would break sampling
        self.model.set_config({**settings, "all_logits": True, "sampler_type": "greedy", "use_template": False})
        self.model.load()

    def forward(self, ids: list[int], fresh: bool) -> npt.NDArray[np.float32]:
        if fresh:
            self.model.reset()
        output = self.model.forward(ids)
        return np.array(output.read(), np.float32).reshape(-1, output.shape[-1])

    def encode(self, text: str) -> list[int]:
        return list(self.model.tokenizer_encode(text))

    def render(self, conversation: Conversation) -> str:
        self.model.set_config({"use_template": True})
        return str(self.model.apply_chat_template(conversation))


@contextmanager
def open_session(folder: Path, settings: dict[str, Any], longest: int) -> Iterator[MnnSession]:
    """The folder in MNN, which needs not know how long a sequence may become."""
    yield MnnSession(folder, settings)


if __name__ == "__main__":
    serve(open_session)
