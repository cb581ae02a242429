"""The comparison of tokenizers and chat templates, and MNN's own jinja on templates of every family."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lowbit.pipeline.checkpoint.chat_template import CONVERSATIONS
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.compare_text import TEXTS, compare_chats, compare_ids
from lowbit.pipeline.convert.genai.config import write_tokenizer_config
from lowbit.pipeline.convert.mnn.tokenizer import tokenizer_bytes
from lowbit.pipeline.report.engine_quality import TemplateMatch, TokenizerMatch
from tests.conftest import PYDOCS
from tests.pipeline.chat_templates import CHATML, REFUSES_SYSTEM, TEMPLATES

RENDER = """
import json, sys
import MNN.llm as llm
model = llm.create(sys.argv[1]); model.load()
model.set_config({"use_template": True})
print("RESULT" + json.dumps([model.apply_chat_template(one) for one in json.loads(sys.argv[2])]))
"""


CUTS_REASONING = ("deepseek r1", "qwen 3")
"""Templates that cut the reasoning out of earlier answers; onnxruntime-genai 0.18 leaves it in, and a run says so."""
RENDER_GENAI = """
import json, sys
import onnxruntime_genai as genai
tokenizer = genai.Tokenizer(genai.Model(sys.argv[1]))
def render(one):
    try:
        return tokenizer.apply_chat_template(json.dumps(one), add_generation_prompt=True)
    except Exception:
        return None
print("RESULT" + json.dumps([render(one) for one in json.loads(sys.argv[2])]))
"""


def test_the_first_text_that_differs_is_the_example() -> None:
    tokenizer = Tokenizer.from_file(str(PYDOCS / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    assert compare_ids(ids, tokenizer) == TokenizerMatch(texts=len(TEXTS), equal=len(TEXTS), example=None)
    ids[3] = ids[3][:-1]
    ids[7] = []
    assert compare_ids(ids, tokenizer) == TokenizerMatch(texts=len(TEXTS), equal=len(TEXTS) - 2, example=TEXTS[3])


def with_template(folder: Path, template: str) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shutil.copyfile(PYDOCS / "tokenizer.json", folder / "tokenizer.json")
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Checkpoint(folder, "x")


@pytest.mark.parametrize("family", TEMPLATES)
def test_mnn_renders_as_transformers_does(results: Callable[..., Path], tmp_path: Path, family: str) -> None:
    checkpoint = with_template(tmp_path / "source", TEMPLATES[family])
    done = results("narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32}")
    folder = shutil.copytree(done / "mnn", tmp_path / "mnn")
    (folder / "tokenizer.mtok").write_bytes(tokenizer_bytes(checkpoint))
    command = [sys.executable, "-c", RENDER, str(folder / "config.json"), json.dumps(CONVERSATIONS)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chats = json.loads(output.split("RESULT")[1].splitlines()[0])
    counted = len(CONVERSATIONS) - (family in REFUSES_SYSTEM)
    assert compare_chats("MNN", chats, checkpoint) == TemplateMatch(conversations=counted, equal=counted, example=None)


@pytest.mark.parametrize("family", TEMPLATES)
def test_onnxruntime_genai_renders_as_transformers_does(results: Callable[..., Path], tmp_path: Path, family: str) -> None:
    checkpoint = with_template(tmp_path / "source", TEMPLATES[family])
    done = results(
        "narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32}", convert="convert: {target: onnxruntime-genai}"
    )
    folder = shutil.copytree(done / "genai", tmp_path / "genai")
    write_tokenizer_config(checkpoint, folder)
    shutil.copyfile(checkpoint.folder / "tokenizer.json", folder / "tokenizer.json")
    command = [sys.executable, "-c", RENDER_GENAI, str(folder), json.dumps(CONVERSATIONS)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chats = json.loads(output.split("RESULT")[1].splitlines()[0])
    counted = len(CONVERSATIONS) - (family in REFUSES_SYSTEM)
    found = compare_chats("genai", chats, checkpoint)
    assert found is not None
    assert (found.conversations, found.equal) == (counted, counted - (family in CUTS_REASONING))
    if family in CUTS_REASONING:
        assert "<think>\\nA greeting." in str(found.example).partition("transformers")[0]


def test_the_first_conversation_that_differs_is_the_example(tmp_path: Path) -> None:
    found = compare_chats("MNN", ["one", "two", "three"], with_template(tmp_path / "source", CHATML))
    assert found is not None
    assert (found.conversations, found.equal) == (3, 0)
    assert str(found.example).startswith("MNN writes 'one', transformers '<|im_start|>user\\n  What is 2 + 2? <|im_end|>")
    assert compare_chats("MNN", ["", "", ""], with_template(tmp_path / "without", "")) is None


def test_a_template_that_tries_to_run_code_is_stopped(tmp_path: Path) -> None:
    """transformers' sandbox raises; the conversation does not count."""
    evil = with_template(tmp_path / "source", "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    assert compare_chats("MNN", ["", "", ""], evil) == TemplateMatch(conversations=0, equal=0, example=None)
