"""Within a process of its own: a folder of onnxruntime-genai in its runtime (see engine_worker.py)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.pipeline.checkpoint.chat_template import Conversation
from lowbit.pipeline.convert.engine_worker import serve
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.runtime.session import load_model


class GenaiSession:
    """A folder that onnxruntime-genai has opened, for sequences of at most `longest` tokens."""

    def __init__(self, folder: Path, longest: int) -> None:
        import onnxruntime_genai

        self.genai, self.longest = onnxruntime_genai, longest
        self.model = onnxruntime_genai.Model(str(folder))
        self.tokenizer = onnxruntime_genai.Tokenizer(self.model)
        self.generator: Any = None

    def forward(self, ids: list[int], fresh: bool) -> npt.NDArray[np.float32]:
        if fresh:
            parameters = self.genai.GeneratorParams(self.model)
            parameters.set_search_options(max_length=self.longest, do_sample=False)
            self.generator = self.genai.Generator(self.model, parameters)
        self.generator.append_tokens(np.array(ids, np.int32))
        return np.array(self.generator.get_output("logits"), np.float32)[0]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).tolist())

    def render(self, conversation: Conversation) -> str | None:
        try:
            return str(self.tokenizer.apply_chat_template(json.dumps(conversation), add_generation_prompt=True))
        except Exception:  # the library raises bare ones: no template, or one that refuses
            return None


@contextmanager
def open_session(folder: Path, settings: dict[str, Any], longest: int) -> Iterator[GenaiSession]:
    """The folder as it is, or with every quantized MatMul computed at the setting `accuracy_level`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as other:
        if "accuracy_level" in settings:
            folder = _at_level(folder, Path(other), settings["accuracy_level"])
        yield GenaiSession(folder, longest)


def _at_level(folder: Path, other: Path, level: int) -> Path:
    """The same folder at another accuracy level: links, but for the graph."""
    for file in folder.iterdir():
        if file.name != MODEL:
            (other / file.name).hardlink_to(file)
    (other / MODEL).write_bytes(load_model(folder / MODEL, level).SerializeToString())
    return other


if __name__ == "__main__":
    serve(open_session)
