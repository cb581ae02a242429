"""Chats with real results in every engine, and a doctor that looks at real engines."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lowbit.pipeline.commands import chat as chat_module
from lowbit.pipeline.commands import doctor
from lowbit.pipeline.commands.chat import Chat, answer, open_chat, sample, talk
from lowbit.pipeline.commands.doctor import disk, engine, examine, memory, python
from lowbit.pipeline.errors import PipelineError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.fixture
def made(results: Callable[..., Path]) -> Path:
    convert = "convert: [{target: mnn-llm}, {target: onnxruntime-genai}]"
    return results("narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32}", convert=convert, kind="llama")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "LONGEST", 12)


def said(chat: Chat, *questions: str) -> str:
    lines, console = iter([*questions, "/quit"]), Console(file=io.StringIO(), width=200)
    talk(chat, console, lambda prompt: next(lines))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_every_engine_answers_the_same(made: Path) -> None:
    answers = {}
    for runtime in ("mnn", "onnx", "genai"):
        chat = open_chat(made, runtime)
        answers[runtime] = "".join(chat.ask("The list"))
        ids = list(chat.read)
        assert answers[runtime]
        assert len(ids) > 10
    assert answers["onnx"] == answers["genai"]  # the same arithmetic; MNN's is another, so its words may be


def test_a_conversation_is_remembered(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.pipeline.commands.chat.chat_template", lambda checkpoint: TEMPLATE)
    chat = open_chat(made, "onnx")
    shown = said(chat, "One", "", "/[/b]", "Two", "/new", "Three")
    assert "/[/b]? There are /quit and /new." in shown
    assert shown.count("tokens/s]") == 3
    assert shown.count("<think>") == 3
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]  # since /new
    assert chat.messages[1]["content"].startswith("<think>")


def test_reading_on_is_reading_anew(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.pipeline.commands.chat.chat_template", lambda checkpoint: TEMPLATE)
    for runtime in ("mnn", "onnx", "genai"):
        chat = open_chat(made, runtime)
        for question in ("One", "Two"):
            "".join(chat.ask(question))
        fresh = open_chat(made, runtime)
        fresh.messages = chat.messages[:2]
        assert "".join(fresh.ask("Two")) == chat.messages[-1]["content"]


def test_characters_come_whole(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "LONGEST", 100)
    chat = open_chat(made, "onnx")
    text = "naïve 你好 👩‍👧 done"
    ids = iter(chat.engine.encode(text))
    chat.choose = lambda scores: next(ids, 0)  # type: ignore[method-assign, assignment]  # 0 ends
    pieces = list(chat.ask("x"))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_what_a_model_writes_is_shown_as_it_is(made: Path) -> None:
    """No markup, no emoji by name, nothing that steers the terminal; families of emoji stay whole."""
    chat = open_chat(made, "onnx")
    chat.ask = lambda text: iter(["[/b] :smile: 👩‍👧 \x1b[2J", "\x07\n\tend"])  # type: ignore[method-assign]
    console = Console(file=io.StringIO(), width=200)
    answer(chat, "One", console)
    assert console.file.getvalue().startswith("[/b] :smile: 👩‍👧 \\x1b[2J\\x07\n")  # type: ignore[attr-defined]


def test_ctrl_c_ends_the_answer_alone(made: Path) -> None:
    chat = open_chat(made, "onnx")

    def stop(scores: np.ndarray) -> int:
        raise KeyboardInterrupt

    chat.choose = stop  # type: ignore[method-assign]
    console = Console(file=io.StringIO())
    answer(chat, "One", console)
    assert "[0 tokens]" in console.file.getvalue()  # type: ignore[attr-defined]
    del chat.choose  # type: ignore[method-assign]
    assert "".join(chat.ask("Two"))


def test_sampling_keeps_to_its_limits() -> None:
    scores, rng = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), np.random.default_rng(0)
    drawn = [sample(scores, rng, {}) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert {sample(scores, rng, {"top_k": 2}) for _ in range(200)} == {0, 1}
    assert {sample(scores, rng, {"top_p": 0.79}) for _ in range(200)} == {0, 1}
    assert {sample(scores, rng, {"temperature": 1e-9}) for _ in range(50)} == {0}


def test_what_nobody_can_talk_to_is_said(made: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="there is no folder for --runtime tpu, only for mnn, genai, onnx"):
        open_chat(made, "tpu")
    with pytest.raises(PipelineError, match="no run has finished here"):
        open_chat(tmp_path, None)
    manifest = json.loads((made / "manifest.json").read_text("utf-8"))
    engines = {name: {"skipped": "not run"} for name in manifest["hand_offs"]}
    manifest |= {"quality": {"onnxruntime": {"samples": 4, "outputs": {}}, **engines}, "gates": []}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PipelineError, match="this model writes no text"):
        open_chat(tmp_path, None)


def test_one_answer_from_the_command_line(made: Path) -> None:
    code = "from lowbit.pipeline.commands import chat; chat.LONGEST = 5; from lowbit.pipeline.__main__ import main; main()"
    command = [sys.executable, "-c", code, "chat", str(made), "--prompt", "The"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "[5 tokens" in done.stdout


def test_the_doctor_finds_all_well_here(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    well = {name: ok for name, ok, _ in findings}
    assert {"onnxruntime", "MNN", "torch", "memory", "disk"} <= set(well)
    assert well["onnxruntime"]
    assert well["MNN"]
    assert well["torch"]


def test_the_doctor_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine("x", "import os; os.kill(os.getpid(), 11)", "", "numpy")[1:] == (
        False, f"{np.__version__} does not run here (died of signal 11); rm -r .venv and type make again",
    )  # fmt: skip
    assert "not installed; pip install lowbit[x]" in engine("x", "", "", "no-such-package", optional="lowbit[x]")[2]
    assert not engine("x", "", "", "no-such-package")[1]
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    assert "hangs" in engine("x", "import time; time.sleep(60)", "", "numpy")[2]
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "LITTLE_DISK", 1 << 60)
    monkeypatch.setattr(doctor, "PYTHON", (4, 0))
    assert [well for _, well, _ in (memory(), disk(tmp_path), python())] == [False] * 3
    if os.geteuid():
        (tmp_path / "sealed").mkdir(mode=0o500)
        assert "cannot be written to" in disk(tmp_path / "sealed")[2]
