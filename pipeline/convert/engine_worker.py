"""Within an engine's own process: every way to compute is asked the same, one after the other.

An engine's worker is a module that is run as `python -m <module> REQUEST.json RESULT.npz`; it says how to open a folder, and
`serve` does the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lowbit.pipeline.checkpoint.chat_template import Conversation
from lowbit.pipeline.convert.engine_process import Answer, Request, save_answers, token_losses


class Session(Protocol):
    """A folder that the engine has opened."""

    def forward(self, ids: list[int], fresh: bool) -> npt.NDArray[np.float32]:
        """Logits [tokens, vocabulary], at least the last ones, of token ids that begin a new sequence or go on."""

    def encode(self, text: str) -> list[int]:
        """Token ids by the engine's tokenizer."""

    def render(self, conversation: Conversation) -> str | None:
        """A conversation by the engine's chat template; None where it refuses."""


OpenSession = Callable[[Path, dict[str, Any], int], AbstractContextManager[Session]]
"""Opens a folder with the settings of a mode, for sequences of at most so many tokens."""


def serve(open_session: OpenSession) -> None:
    """Answer the request that the command line names."""
    request_file, result_file = map(Path, sys.argv[1:])
    asked = json.loads(request_file.read_text("utf-8"))
    request = Request(**asked["request"])
    folder = Path(asked["folder"])
    answers = {
        name: _answer(open_session(folder, settings, request.longest), request) for name, settings in asked["modes"].items()
    }
    save_answers(result_file, answers)


def _answer(opening: AbstractContextManager[Session], request: Request) -> Answer:
    """Open a session, ask it everything, close it: one model is in memory at a time."""
    with opening as session:
        return answer(session, request)


def answer(session: Session, request: Request) -> Answer:
    """Compute what was asked, from scratch each time, and token by token where the cache is looked at."""
    logits = session.forward(request.probe, True)
    session.forward(request.probe[: -request.steps], True)
    steps = [session.forward([token], False)[-1] for token in request.probe[-request.steps :]]
    greedy = [_continued(session, prompt, request.new_tokens) for prompt in request.prompts]
    losses = [token_losses(session.forward(ids, True), ids) for ids in request.windows]
    ids = [list(session.encode(text)) for text in request.texts]
    chats = [session.render(conversation) for conversation in request.conversations]
    return Answer(logits, np.array(steps), greedy, np.array(losses), ids, chats)


def _continued(session: Session, prompt: list[int], count: int) -> list[int]:
    scores, chosen = session.forward(prompt, True)[-1], list[int]()
    for _ in range(count):
        chosen.append(int(scores.argmax()))
        scores = session.forward(chosen[-1:], False)[-1]
    return chosen
