"""The engines that a result can be talked to in, all by the same five words."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.errors import PipelineError


class Engine(ABC):
    """A model with a cache of what it has read."""

    @abstractmethod
    def __init__(self, folder: Path) -> None:
        """Load the model from a finished result."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text that has its special tokens in it."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""

    @abstractmethod
    def forward(self, ids: list[int]) -> np.ndarray:
        """Logits float32 [vocabulary] after reading some more tokens."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was read."""


class _Tokenized(Engine):
    """An engine that is given token ids by the checkpoint's own tokenizer."""

    def __init__(self, folder: Path) -> None:
        from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(open_checkpoint(folder / "onnx", str(folder)))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


class Mnn(_Tokenized):
    """MNN's LLM runtime, as it is shipped."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with _quiet():
            import MNN.llm as llm

            self.model = llm.create(str(folder / "mnn" / "config.json"))
            self.model.set_config({"use_template": False, "thread_num": os.cpu_count()})
            self.model.load()
        if self.model is None:
            raise PipelineError(f"{folder / 'mnn'}: MNN does not open it.")

    def encode(self, text: str) -> list[int]:
        return list(self.model.tokenizer_encode(text))

    def forward(self, ids: list[int]) -> np.ndarray:
        output = self.model.forward(ids)
        return np.array(output.read(), np.float32).reshape(-1, output.shape[-1])[-1]

    def reset(self) -> None:
        self.model.reset()


class Onnxruntime(_Tokenized):
    """Plain onnxruntime, the graph as exported."""

    def __init__(self, folder: Path) -> None:
        from lowbit.pipeline.runtime.session import open_model

        super().__init__(folder)
        self.session = open_model(folder / "onnx" / "model.onnx")
        self.past: dict[str, np.ndarray] | None = None

    def forward(self, ids: list[int]) -> np.ndarray:
        from lowbit.pipeline.runtime.session import decode

        logits, self.past = decode(self.session, ids, self.past)
        return logits

    def reset(self) -> None:
        self.past = None


class Genai(_Tokenized):
    """onnxruntime-genai's loop."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            import onnxruntime_genai
        except ModuleNotFoundError as error:
            raise PipelineError("onnxruntime-genai is not installed: pip install lowbit[genai].") from error
        self.genai, self.model = onnxruntime_genai, onnxruntime_genai.Model(str(folder / "genai"))
        self.reset()

    def forward(self, ids: list[int]) -> np.ndarray:
        self.generator.append_tokens(np.array(ids, np.int32))
        return np.array(self.generator.get_output("logits"), np.float32)[0, -1]

    def reset(self) -> None:
        self.generator = self.genai.Generator(self.model, self.genai.GeneratorParams(self.model))


# the folders of a result, the one to talk to first
ENGINES: dict[str, type[Engine]] = {"mnn": Mnn, "genai": Genai, "onnx": Onnxruntime}


@contextmanager
def _quiet() -> Iterator[None]:
    """What a library prints from C while it loads, into nothing."""
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
