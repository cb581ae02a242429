"""`lowbit chat`: talk to a finished result in any engine that it was handed to, or in onnxruntime, before it is shipped."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from lowbit.pipeline.checkpoint.chat_template import ChatRenderer, chat_template
from lowbit.pipeline.checkpoint.huggingface import Checkpoint, open_checkpoint
from lowbit.pipeline.checkpoint.tokenizer import stop_ids
from lowbit.pipeline.convert.chat_engine import ChatEngine, OnnxEngine
from lowbit.pipeline.convert.registry import find_target
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.report.manifest import read_manifest
from lowbit.pipeline.report.plain_text import plain
from lowbit.pipeline.runtime.session import open_model

LONGEST = 4096
"""Tokens of an answer."""
THINK, END_THINK = "<think>", "</think>"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a character looks like whose bytes have not all come."""


@dataclass
class Chat:
    """A conversation with a model: its own template, its own way of choosing tokens."""

    engine: ChatEngine
    checkpoint: Checkpoint
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    messages: list[dict[str, str]] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    """Token ids in the engine's cache."""
    count: int = 0
    """Tokens of the last answer."""

    def ask(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; both are remembered."""
        self.messages.append({"role": "user", "content": text})
        prompt = self._prompt(text)
        thinking = prompt.rstrip().endswith(THINK)
        if thinking:
            yield THINK
        ids = self.engine.encode(prompt)
        if self.read != ids[: len(self.read)] or len(ids) == len(self.read):
            self.engine.reset()
            self.read = []
        scores = self.engine.forward(ids[len(self.read) :])
        self.read = list(ids)
        answer: list[int] = []
        self.count = 0
        written, stop = "", set(stop_ids(self.checkpoint))
        before = shown = 0  # tokens whose text is context, and tokens whose text was given out
        for _ in range(LONGEST):
            token = self.choose(scores)
            if token in stop:
                break
            answer.append(token)
            self.count += 1
            text = self.engine.decode(answer[before:])
            if not text.endswith(UNFINISHED):
                piece = text[len(self.engine.decode(answer[before:shown])) :]
                before, shown = shown, len(answer)
                written += piece
                yield piece
            scores = self.engine.forward([token])
            self.read.append(token)
        self.messages.append({"role": "assistant", "content": THINK * thinking + written})

    def _prompt(self, text: str) -> str:
        return text if self._renderer is None else self._renderer.render(self.messages)

    @cached_property
    def _renderer(self) -> ChatRenderer | None:
        template = chat_template(self.checkpoint)
        return ChatRenderer(self.checkpoint, template) if template else None

    @cached_property
    def _sampling(self) -> dict[str, Any]:
        return self.checkpoint.read_json("generation_config.json")

    def choose(self, scores: np.ndarray) -> int:
        """The next token, as the model's generation_config.json says, from logits float32 [vocabulary]."""
        return sample(scores, self.rng, self._sampling) if self._sampling.get("do_sample") else int(scores.argmax())


def sample(scores: np.ndarray, rng: np.random.Generator, options: dict[str, Any]) -> int:
    """One token by `temperature`, `top_k` and `top_p`, as transformers' generation_config.json names them.

    Args:
        scores: logits float32 [vocabulary].
    """
    order = np.argsort(-scores)[: options.get("top_k") or None]
    logits = scores[order].astype(np.float64) / max(float(options.get("temperature", 1.0)), 1e-6)
    p = np.exp(logits - logits[0])
    p /= p.sum()
    kept = 1 + int(np.searchsorted(np.cumsum(p), float(options.get("top_p", 1.0))))
    return int(rng.choice(order[:kept], p=p[:kept] / p[:kept].sum()))


def open_chat(folder: Path, runtime: str | None) -> Chat:
    """A chat with `build/<recipe>`, by default in the first engine that it was handed to.

    Raises:
        PipelineError: it is no finished result, writes no text, or has no such engine.
    """
    manifest = read_manifest(folder)
    there = [name for name in (*manifest.hand_offs, "onnx") if (folder / name).is_dir()]
    if manifest.quality.outputs is not None:
        raise PipelineError(f"{folder}: this model writes no text, so there is nothing to talk to.")
    chosen = runtime or there[0]
    if chosen not in there:
        raise PipelineError(f"{folder}: there is no folder for --runtime {chosen}, only for {', '.join(there)}.")
    checkpoint = open_checkpoint(folder / "onnx", str(folder))
    if chosen == "onnx":
        return Chat(OnnxEngine(open_model(folder / "onnx" / MODEL), checkpoint), checkpoint)
    return Chat(find_target(manifest.hand_offs[chosen].target).chat(folder / chosen, checkpoint), checkpoint)


def answer(chat: Chat, text: str, console: Console) -> None:
    """Print an answer as it comes, reasoning dim, and how fast it came. Ctrl-C ends it."""
    began, first, style = time.monotonic(), None, ""
    try:
        for piece in chat.ask(text):
            first = first or time.monotonic()
            for part in _split(piece):
                style = "dim" if part == THINK else style
                console.print(_shown(part), style=style, end="", soft_wrap=True)
                style = "" if part == END_THINK else style
    except KeyboardInterrupt:
        chat.read = []  # the cache holds half an answer
        chat.engine.reset()
    seconds = time.monotonic() - (first or began)
    speed = f", {(chat.count - 1) / seconds:.1f} tokens/s" if chat.count > 1 else ""
    console.print(f"\n[{chat.count} tokens{speed}]", style="dim", markup=False, highlight=False)


def talk(chat: Chat, console: Console, read: Callable[[str], str] = input) -> None:
    """Answer what is typed until /quit or the end of the input; /new forgets the conversation."""
    console.print("/quit ends, /new forgets the conversation.", style="dim", highlight=False)
    while True:
        try:
            text = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/quit":
            return
        if text == "/new":
            chat.messages.clear()
        elif text.startswith("/"):
            console.print(plain(f"{text}? There are /quit and /new."), style="dim")
        elif text:
            answer(chat, text, console)


def _shown(piece: str) -> Text:
    """What a model wrote, as it is: no markup, no names of emoji, nothing that steers the terminal."""
    return Text("".join(ascii(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in piece))


def _split(piece: str) -> list[str]:
    """A piece of text, cut around the marks of reasoning."""
    for mark in (THINK, END_THINK):
        if mark in piece:
            before, _, after = piece.partition(mark)
            return [part for part in (before, mark, after) if part]
    return [piece]
