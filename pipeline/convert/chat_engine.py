"""What a chat asks of an engine: five words, whatever computes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import onnxruntime

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.runtime.session import decode


class ChatEngine(ABC):
    """A model with a cache of what it has read."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text that has its special tokens in it."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of some tokens."""

    @abstractmethod
    def forward(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits [vocabulary] after reading some more tokens."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was read."""


class TokenizedEngine(ChatEngine):
    """An engine that is given token ids by the checkpoint's own tokenizer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer = load_tokenizer(checkpoint)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


class OnnxEngine(TokenizedEngine):
    """Plain onnxruntime on a decoder as it is exported."""

    def __init__(self, session: onnxruntime.InferenceSession, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.session = session
        self.past: dict[str, npt.NDArray[np.float32]] | None = None

    def forward(self, ids: list[int]) -> npt.NDArray[np.float32]:
        logits, self.past = decode(self.session, ids, self.past)
        return logits

    def reset(self) -> None:
        self.past = None
