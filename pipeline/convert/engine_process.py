"""What an engine computed from a finished folder: measured in a process of its own, the same way for every engine.

Engines may crash, print what they like, and never share a process with the libraries of the rest.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.pipeline.checkpoint.chat_template import Conversation
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.processes import run_worker, same_path

SECONDS = 4 * 3600
"""An engine that has not answered by then hangs."""
LAST_LINES = 12
ROWS = 64
"""Tokens whose logits are widened to float64 at once."""


@dataclass(frozen=True)
class Request:
    """What is asked of an engine.

    Attributes:
        probe: token ids to compute logits of, in one piece, then the last of them token by token.
        steps: how many of them token by token.
        prompts: token ids, each to be continued by `new_tokens` greedy ones.
        windows: token ids to predict, each window from scratch.
        texts: to encode.
        conversations: to render by the chat template.
    """

    probe: list[int]
    steps: int
    prompts: list[list[int]]
    new_tokens: int
    windows: list[list[int]]
    texts: Sequence[str]
    conversations: Sequence[Conversation]

    @property
    def longest(self) -> int:
        """The most tokens that a sequence may have, and one to spare."""
        return 1 + max(self.new_tokens + max(map(len, self.prompts)), *map(len, [self.probe, *self.windows]))


@dataclass(frozen=True)
class Answer:
    """What the engine made of a request in one of its modes.

    Attributes:
        logits: [tokens, vocabulary] of one prefill of the probe.
        steps: the same logits, the last `len(steps)` of them decoded token by token on the cache.
        greedy: token ids continued from each prompt.
        losses: [windows, tokens - 1], negative log-likelihood of each next token.
        ids: what the tokenizer made of each text.
        chats: what the chat template made of each conversation; None where it refused.
    """

    logits: npt.NDArray[np.float32]
    steps: npt.NDArray[np.float32]
    greedy: list[list[int]]
    losses: npt.NDArray[np.float64]
    ids: list[list[int]]
    chats: list[str | None]


ARRAYS = ("logits", "steps", "losses")
"""Parts of an answer that are kept as they are; the others are JSON."""


def ask_engine(
    engine: str, module: str, folder: Path, modes: Mapping[str, Mapping[str, Any]], scratch: Path, request: Request
) -> dict[str, Answer]:
    """Ask `folder` in `engine`, in one process for all `modes`.

    Args:
        module: the engine's worker, see `engine_worker.py`.
        modes: settings that the worker understands, by the mode's name.

    Raises:
        ConvertError: the engine crashed or refused the folder.
    """
    asked, result = scratch / "request.json", scratch / "result.npz"
    asked.write_text(json.dumps({"folder": str(folder), "modes": modes, "request": asdict(request)}), "utf-8")
    run_module(engine, module, folder, asked, result)
    with np.load(result) as found:
        return {
            name: Answer(**{part: found[f"{name}.{part}"] for part in ARRAYS}, **json.loads(str(found[f"{name}.rest"])))
            for name in modes
        }


def save_answers(result: Path, answers: dict[str, Answer]) -> None:
    """Write what `ask_engine` reads, in the engine's process."""
    parts: dict[str, npt.NDArray[Any]] = {}
    for name, answer in answers.items():
        parts |= {f"{name}.{part}": getattr(answer, part) for part in ARRAYS}
        rest = {part: value for part, value in vars(answer).items() if part not in ARRAYS}
        parts[f"{name}.rest"] = np.array(json.dumps(rest))
    np.savez(result, allow_pickle=False, **parts)


def run_module(engine: str, module: str, what: Path, request: Path, result: Path) -> None:
    """`python -m <module> REQUEST RESULT` in a process of its own, which finds modules where this one does.

    Raises:
        ConvertError: it crashed, or wrote no result; with its last lines.
    """
    result.unlink(missing_ok=True)
    try:
        done = run_worker("-m", module, str(request), str(result), seconds=SECONDS, env=same_path())
    except subprocess.TimeoutExpired as error:
        raise ConvertError(f"{engine} did not finish {what} in {SECONDS} s and was stopped.") from error
    if done.returncode or not result.exists():
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:])
        raise ConvertError(f"{engine} failed on {what} (status {done.returncode}):\n{end}")


def token_losses(logits: npt.NDArray[np.float32], ids: list[int]) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each next token, [len(ids) - 1], from logits [len(ids), vocabulary]."""
    losses = np.empty(len(ids) - 1)
    for start in range(0, len(losses), ROWS):
        wide = logits[start : min(start + ROWS, len(losses))].astype(np.float64)
        top = wide.max(1)
        total = np.log(np.exp(wide - top[:, None]).sum(1)) + top
        losses[start : start + ROWS] = total - wide[np.arange(len(wide)), ids[start + 1 : start + 1 + len(wide)]]
    return losses
