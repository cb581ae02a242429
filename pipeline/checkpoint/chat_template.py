"""A checkpoint and a conversation -> the text that its model reads: the chat template, found and rendered in one place.

A template is a program of the checkpoint's author: it runs only in a process that has little time and memory.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import weakref
from pathlib import Path

from lowbit.pipeline.checkpoint.files import read_text
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import special_texts
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.limits import TEMPLATE_SECONDS
from lowbit.pipeline.processes import same_path, start_worker

WAIT = 60
"""Seconds until a process that uses no processor time is given up; it starts in one or two."""

Conversation = list[dict[str, str]]

CONVERSATIONS: tuple[Conversation, ...] = (
    [{"role": "user", "content": "  What is 2 + 2? "}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello!"},
        {"role": "user", "content": "Bye"},
    ],
)
"""A question, a system prompt, and an answer with its reasoning, of which templates keep more or less."""


class TemplateRefusal(CheckpointError):  # noqa: N818  (a template may refuse a role that it does not know)
    """A conversation that a template makes no text of.

    Attributes:
        fatal: whether the template is broken, rather than this conversation none of its.
    """

    def __init__(self, message: str, fatal: bool) -> None:
        super().__init__(message)
        self.fatal = fatal


class ChatRenderer:
    """A chat template in a process of its own, started by the first conversation and ended with this object."""

    def __init__(self, checkpoint: Checkpoint, template: str) -> None:
        self._folder = checkpoint.folder
        self._asked = json.dumps({"template": template, "tokens": special_texts(checkpoint)})
        self._process: subprocess.Popen[str] | None = None

    def render(self, conversation: Conversation) -> str:
        """A conversation as the template writes it, up to where the model's answer begins.

        Raises:
            TemplateRefusal: the template refuses the conversation, reaches out of its sandbox, is no template, or takes too
                long or too much.
        """
        if self._process is None:
            self._process = _start(self._asked)
            weakref.finalize(self, _end, self._process)
        line = _ask(self._process, json.dumps(conversation))
        if not line.endswith("\n"):
            process, self._process = self._process, None
            late = process.wait() in (-signal.SIGXCPU, -signal.SIGKILL)
            why = f"takes more than {TEMPLATE_SECONDS} s" if late else f"ends its process (status {process.returncode})"
            raise _refusal(self._folder, why, fatal=True)
        answer = json.loads(line)
        if "text" in answer:
            return str(answer["text"])
        raise _refusal(self._folder, answer["error"], answer["fatal"])


def _start(asked: str) -> subprocess.Popen[str]:
    process = start_worker(
        "-m", "lowbit.pipeline.checkpoint.template_worker", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=same_path(),
    )  # fmt: skip
    _tell(process, asked)
    return process


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended; reading tells
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _ask(process: subprocess.Popen[str], line: str) -> str:
    """One line of answer, "" or a part of one where the process ends or keeps us waiting."""
    assert process.stdout is not None
    alarm = threading.Timer(WAIT, process.kill)
    alarm.start()
    try:
        _tell(process, line)
        return process.stdout.readline()
    finally:
        alarm.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()


def _refusal(folder: Path, why: str, fatal: bool) -> TemplateRefusal:
    where = "chat_template.jinja" if (folder / "chat_template.jinja").exists() else "tokenizer_config.json"
    remedy = f" Mend it in {where}, or take it out." if fatal else ""
    return TemplateRefusal(f"{folder}: its chat template {why}.{remedy}", fatal)


def check_template(checkpoint: Checkpoint) -> None:
    """Render some conversations.

    Raises:
        TemplateRefusal: the template reaches out of its sandbox, is no template, or takes too long or too much.
    """
    if not (template := chat_template(checkpoint)):
        return
    renderer = ChatRenderer(checkpoint, template)
    for conversation in CONVERSATIONS:
        try:
            renderer.render(conversation)
        except TemplateRefusal as error:
            if error.fatal:
                raise


def chat_template(checkpoint: Checkpoint) -> str:
    """The checkpoint's chat template, "" without one.

    The file chat_template.jinja, which comes first in transformers, too; else that of tokenizer_config.json, of several named
    ones the default, which is all that engines know.
    """
    if (text := read_text(checkpoint.folder, "chat_template.jinja")) is not None:
        return text
    template = checkpoint.read_json("tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template", "") if named else ""
    if not isinstance(template, str):
        where = checkpoint.folder / "tokenizer_config.json"
        raise CheckpointError(f"{where}: its chat_template is a {type(template).__name__}, expected text.")
    return template
