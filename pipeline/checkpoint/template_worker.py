"""Conversations in, texts out: the process in which chat templates run, with little time and memory.

Run as `python -m lowbit.pipeline.checkpoint.template_worker`. Its first line of input is JSON, {"template", "tokens"}; each
later one is a conversation, answered by one line: {"text"}, or {"error", "fatal"}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from lowbit.pipeline.limits import (
    TEMPLATE_BYTES,
    TEMPLATE_CHARACTERS,
    TEMPLATE_SECONDS,
    limit_memory,
    limit_seconds,
)


def _main() -> None:
    os.environ["USE_TORCH"] = "0"  # transformers would import it, and it takes two seconds
    import transformers.utils.chat_template_utils  # noqa: F401  (before its memory counts)

    limit_memory(TEMPLATE_BYTES)
    asked = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        limit_seconds(TEMPLATE_SECONDS)
        answer = json.dumps(_answer(asked["template"], json.loads(line), asked["tokens"]))
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(template: str, conversation: list[dict[str, str]], tokens: dict[str, str]) -> dict[str, Any]:
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=[conversation], chat_template=template, add_generation_prompt=True, **tokens
        )
        if len(texts[0]) <= TEMPLATE_CHARACTERS:
            return {"text": str(texts[0])}
        return {"error": f"writes {len(texts[0]):,} characters, at most {TEMPLATE_CHARACTERS:,} are read", "fatal": True}
    except Exception as error:  # a template may raise whatever Python does
        fatal = not isinstance(error, TemplateError) or isinstance(error, SecurityError | TemplateSyntaxError)
        why = f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ") if fatal else str(error)[:300]
        return {"error": f"cannot be rendered: {why}" if fatal else f"refuses this conversation: {why}", "fatal": fatal}


if __name__ == "__main__":
    _main()
