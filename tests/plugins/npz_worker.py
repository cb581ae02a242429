"""The toy engine's own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lowbit.pipeline.convert.engine_worker import serve
from lowbit.pipeline.runtime.session import decoder_feeds
from tests.plugins.npz_engine import TOKENIZER, open_npz


class NpzSession:
    """onnxruntime, with the cache handed around."""

    def __init__(self, folder: Path, accuracy_level: int | None) -> None:
        self.session = open_npz(folder, accuracy_level)
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self.past: dict[str, np.ndarray] | None = None

    def forward(self, ids: list[int], fresh: bool) -> np.ndarray:
        names = [output.name for output in self.session.get_outputs()]
        feeds = decoder_feeds(self.session, np.array([ids]), None if fresh else self.past)
        outputs = dict(zip(names, self.session.run(None, feeds), strict=True))
        self.past = {name.replace("present.", "past_key_values."): value for name, value in outputs.items() if "." in name}
        return np.array(outputs["logits"][0])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def render(self, conversation: Any) -> None:
        """It has no chat template."""


@contextmanager
def open_session(folder: Path, settings: dict[str, Any], longest: int) -> Iterator[NpzSession]:
    yield NpzSession(folder, settings.get("accuracy_level"))


if __name__ == "__main__":
    serve(open_session)
