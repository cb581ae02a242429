"""A checkpoint and a conversation -> the text that its model reads: the chat template, found and rendered in one place.

A template is a program of the checkpoint's author: it is tried once, in a process that has little time and memory.

Run as `python -m lowbit.pipeline.checkpoint.chat_template`, with the template, conversations and special tokens as JSON on
its input.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Any

import psutil

from lowbit.pipeline.checkpoint.files import read_text
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import special_texts
from lowbit.pipeline.errors import CheckpointError

SECONDS, BYTES = 3, 256 << 20
"""Of processor time and of memory, beyond what it takes to import transformers."""

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


def check_template(checkpoint: Checkpoint) -> None:
    """Render some conversations.

    Raises:
        CheckpointError: the template reaches out of its sandbox, is no template, or takes too long or too much.
    """
    if not (template := chat_template(checkpoint)):
        return
    asked = json.dumps({"template": template, "tokens": special_texts(checkpoint)})
    command = [sys.executable, "-P", "-m", "lowbit.pipeline.checkpoint.chat_template"]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{checkpoint.folder}: its chat template does not come to an end.") from error
    if done.returncode == 0:
        return
    if done.returncode < 0:
        why = f"takes more than {SECONDS} s"
    else:
        why = "cannot be rendered: " + (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
    raise CheckpointError(f"{checkpoint.folder}: its chat template {why}. Mend it in tokenizer_config.json, or take it out.")


def _main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    import transformers.utils.chat_template_utils  # noqa: F401  (before its memory counts)
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    _limit_resources()
    for conversation in CONVERSATIONS:
        try:
            render(asked["template"], conversation, asked["tokens"])
        except (SecurityError, TemplateSyntaxError):
            raise
        except TemplateError:  # the template refuses this conversation, as it may
            continue


def _limit_resources() -> None:
    """Little time and memory from here on, beyond what the imports took."""
    import resource  # no module of every system

    used = resource.getrusage(resource.RUSAGE_SELF)
    most = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + SECONDS,
        resource.RLIMIT_AS: psutil.Process().memory_info().vms + BYTES,
    }
    for what, limit in most.items():
        _, hard = resource.getrlimit(what)
        with contextlib.suppress(ValueError):  # macOS takes no limit of memory; that of time ends what runs away
            resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def chat_template(checkpoint: Checkpoint) -> str:
    """The checkpoint's chat template, "" without one.

    That of tokenizer_config.json (of several named ones the default, which is all that engines know), else the file
    chat_template.jinja.
    """
    template = checkpoint.read_json("tokenizer_config.json").get("chat_template") or ""
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), "")
    return str(template) if template else read_text(checkpoint.folder, "chat_template.jinja") or ""


def render(template: str, conversation: Conversation, tokens: dict[str, str]) -> str:
    """A conversation as `template` writes it, up to where the model's answer begins.

    Args:
        tokens: what the template may use by name, as `special_texts` gives it.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses the conversation, or is none.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # heavy; runs templates in a sandbox

    texts, _ = render_jinja_template(conversations=[conversation], chat_template=template, add_generation_prompt=True, **tokens)
    return str(texts[0])


if __name__ == "__main__":
    _main()
