"""Chat templates: found as transformers finds them, run where they can do no harm."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.checkpoint.chat_template import CONVERSATIONS, ChatRenderer, TemplateRefusal, chat_template, check_template
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import CheckpointError
from tests.pipeline.chat_templates import CHATML, TEMPLATES

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"


def checkpoint(folder: Path, config: Any = "", file: str | None = None) -> Checkpoint:
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "<s>", "chat_template": config})
    )
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    return Checkpoint(folder, "x")


@pytest.mark.parametrize("config", ["config", [{"name": "default", "template": "config"}]])
@pytest.mark.parametrize("file", ["file", None])
def test_the_template_is_that_of_transformers(tmp_path: Path, config: Any, file: str | None) -> None:
    from transformers import AutoTokenizer

    from tests.conftest import PYDOCS

    (tmp_path / "tokenizer.json").write_bytes((PYDOCS / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": config})
    )
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert chat_template(Checkpoint(tmp_path, "x")) == AutoTokenizer.from_pretrained(tmp_path).get_chat_template()


def test_no_template_is_none(tmp_path: Path) -> None:
    assert chat_template(checkpoint(tmp_path)) == chat_template(checkpoint(tmp_path, [{"name": "other"}, 3])) == ""
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: its chat_template is a dict, expected text"):
        chat_template(checkpoint(tmp_path, {"a": 1}))


def test_one_process_renders_all_families_as_transformers_does_here(tmp_path: Path) -> None:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    for template in TEMPLATES.values():
        renderer = ChatRenderer(checkpoint(tmp_path), template)
        processes = set()
        for conversation in CONVERSATIONS:
            options = {"add_generation_prompt": True, "eos_token": "</s>", "bos_token": "<s>"}
            try:
                texts, _ = render_jinja_template(conversations=[conversation], chat_template=template, **options)
            except TemplateError:
                with pytest.raises(TemplateRefusal, match="refuses this conversation"):
                    renderer.render(conversation)
            else:
                assert renderer.render(conversation) == texts[0]
            processes.add(renderer._process)
        assert len(processes) == 1


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ENDLESS, "takes more than 3 s"),
        ("{{ 'x' * 99999999999 }}", "cannot be rendered: (MemoryError|OverflowError)"),
        ("{{ 'x' * 20000000 }}", r"writes 20,000,000 characters, at most 16,777,216 are read"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered: SecurityError"),
        ("{% if %}", "cannot be rendered: TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot be rendered: RecursionError"),
    ],
)
def test_what_is_no_honest_template(tmp_path: Path, template: str, why: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateRefusal, match=rf"its chat template {why}.*Mend it in chat_template.jinja") as caught:
        check_template(checkpoint(tmp_path, CHATML, template))
    assert caught.value.fatal
    assert time.monotonic() - began < 20  # ten on a machine of its own


def test_a_template_that_turns_bad_later_is_stopped_then(tmp_path: Path) -> None:
    template = "{% if 'go' in messages[0].content %}" + ENDLESS + "{% endif %}fine"
    check_template(checkpoint(tmp_path, template))
    renderer = ChatRenderer(checkpoint(tmp_path, template), template)
    with pytest.raises(TemplateRefusal, match="takes more than 3 s"):
        renderer.render([{"role": "user", "content": "go"}])
    assert renderer.render([{"role": "user", "content": "stay"}]) == "fine", "a new process"


def test_the_process_ends_with_its_renderer(tmp_path: Path) -> None:
    renderer = ChatRenderer(checkpoint(tmp_path, "x"), "x")
    renderer.render(CONVERSATIONS[0])
    assert renderer._process is not None
    number = renderer._process.pid
    del renderer
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
