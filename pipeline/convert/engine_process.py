"""What an engine computed from a finished folder: measured in a process of its own, the same way for every engine.

Engines may crash, print what they like, and never share a process with the libraries of the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.pipeline.errors import ConvertError

SECONDS = 4 * 3600
"""An engine that has not answered by then hangs."""
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
    conversations: Sequence[Any]


@dataclass(frozen=True)
class Measured:
    """What the engine computed.

    Attributes:
        logits: float32 [tokens, vocabulary] of one prefill of the probe.
        steps: the same logits, the last `len(steps)` of them decoded token by token on the cache.
        greedy: token ids continued from each prompt.
        losses: float64 [windows, tokens - 1], negative log-likelihood of each next token.
        ids: what the tokenizer made of each text.
        chats: what the chat template made of each conversation; None where it refused.
    """

    logits: np.ndarray
    steps: np.ndarray
    greedy: list[list[int]]
    losses: np.ndarray
    ids: list[list[int]]
    chats: list[str | None]


def measure(engine: str, module: str, folder: Path, request: Request, scratch: Path, **settings: Any) -> Measured:
    """Run `folder` in `engine`: `python -m <module> REQUEST.json RESULT.npz`, which calls `answer`.

    Raises:
        ConvertError: the engine crashed or refused the folder.
    """
    asked, result = scratch / "request.json", scratch / "result.npz"
    asked.write_text(json.dumps({"folder": str(folder), **settings, "request": asdict(request)}))
    run_module(engine, module, folder, asked, result)
    with np.load(result) as found:
        written = json.loads(str(found["written"]))
        return Measured(found["logits"], found["steps"], found["greedy"].tolist(), found["losses"], **written)


def run_module(engine: str, module: str, what: Path, request: Path, result: Path) -> None:
    """`python -m <module> REQUEST RESULT` in a process of its own.

    Raises:
        ConvertError: it crashed, or wrote no result; with its last lines.
    """
    result.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", module, str(request), str(result)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ConvertError(f"{engine} did not finish {what} in {SECONDS} s and was stopped.") from error
    if done.returncode or not result.exists():
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise ConvertError(f"{engine} failed on {what} (status {done.returncode}):\n{end}")


def answer(
    asked: dict[str, Any],
    result: str,
    forward: Callable[[list[int], bool], np.ndarray],
    encode: Callable[[str], list[int]],
    render: Callable[[Any], str | None],
) -> None:
    """Within the engine's process: compute what was asked, write it to `result`.

    Args:
        forward: token ids, and whether they begin a new sequence -> logits float32 [tokens, vocabulary], at least the last.
    """
    probe = asked["probe"]
    logits = forward(probe, True)
    forward(probe[: -asked["steps"]], True)
    steps = [forward([token], False)[-1] for token in probe[-asked["steps"] :]]
    greedy: list[list[int]] = []
    for prompt in asked["prompts"]:
        scores, chosen = forward(prompt, True)[-1], []
        for _ in range(asked["new_tokens"]):
            chosen.append(int(scores.argmax()))
            scores = forward(chosen[-1:], False)[-1]
        greedy.append(chosen)
    losses = [token_losses(forward(ids, True), ids) for ids in asked["windows"]]
    ids = [encode(text) for text in asked["texts"]]
    written = json.dumps({"ids": ids, "chats": [render(one) for one in asked["conversations"]]})
    np.savez(result, logits=logits, steps=np.array(steps), greedy=np.array(greedy), losses=np.array(losses), written=written)


def token_losses(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Negative log-likelihood of each next token, float64 [len(ids) - 1], from logits [len(ids), vocabulary]."""
    losses = np.empty(len(ids) - 1)
    for start in range(0, len(losses), ROWS):
        wide = logits[start : min(start + ROWS, len(losses))].astype(np.float64)
        top = wide.max(1)
        total = np.log(np.exp(wide - top[:, None]).sum(1)) + top
        losses[start : start + ROWS] = total - wide[np.arange(len(wide)), ids[start + 1 : start + 1 + len(wide)]]
    return losses
