"""The command line: its words, what holds for all of them, and figures for other programs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from lowbit.pipeline.__main__ import main
from lowbit.pipeline.store.store import Store
from tests.tiny import recipe_text

Lowbit = Callable[..., tuple[int, str, str]]
RUNNING = ("quantize", "run", "plan", "frontier", "sweep", "measure")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Lowbit]:
    """`lowbit ...` in this process and a folder of its own: status, stdout, stderr."""
    log = logging.getLogger("lowbit")
    level, handlers = log.level, list(log.handlers)
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    yield call
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    passes = ("narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32}")
    path.write_text(recipe_text(tiny("llama"), *passes, validate="validate: {window: 64, windows: 1}"), "utf-8")
    return path


def test_every_word_has_help(run: Lowbit) -> None:
    status, listed, _ = run("help")
    assert status == 0
    for word in (*RUNNING, "check", "compare", "chat", "clean", "doctor", "schema"):
        assert f"  {word} " in listed
        assert "..." not in next(line for line in listed.splitlines() if line.startswith(f"  {word} ")), "said in one line"
        assert run("help", word)[1].startswith(f"Usage: lowbit {word} ")
    assert run("--version")[1] == f"lowbit {version('lowbit')}\n"


def test_misspelt_words_and_options_are_answered(run: Lowbit) -> None:
    status, _, errors = run("rnu")
    assert status == 2
    assert "No such command 'rnu'. Did you mean 'run'?" in errors
    status, _, errors = run("run", "demo-q3", "--modle", "x")
    assert status == 2
    assert "--model" in errors
    assert run("run", "demo-q33")[2].endswith("demo-q33.yaml: no such recipe. Did you mean 'demo-q3'?\n")


def test_figures_as_json(run: Lowbit, recipe: Path, tmp_path: Path, export: Callable[..., Path]) -> None:
    """Nothing but JSON is on stdout."""
    export("llama", Store(tmp_path / "build" / ".store"))
    planned = json.loads(run("plan", recipe, "--json")[1])
    status, out, progress = run("run", recipe, "--json")
    assert status == 0
    assert "write onnx" in progress
    figures = json.loads(out)
    assert figures["quality"]["onnxruntime"]["kl_divergence"] > 0
    assert figures["size"]["bits_per_weight"] == pytest.approx(planned["bits_per_weight"])
    assert set(planned["weights"]["lm_head"]) == {"shape", "bits", "block_size", "method", "onnx_bytes", "known"}
    folder = figures["folder"]
    assert json.loads(run("check", folder, "--json")[1])["weights"] == figures["hand_offs"]["mnn"]["weights_checked"]
    compared = json.loads(run("compare", folder, "--json")[1])
    assert compared["results"]["mine"]["size"] == figures["size"]
    swept = json.loads(run("sweep", recipe, "--vary", "passes.quantize_matmul.bits=4,3", "--json")[1])
    assert list(swept["results"]) == ["bits=4", "bits=3"]
    assert swept["failures"] == {}


def test_quiet_and_verbose(run: Lowbit, recipe: Path, tmp_path: Path, export: Callable[..., Path]) -> None:
    """They stand anywhere; quiet prints where the result is, verbose logs on stderr."""
    export("llama", Store(tmp_path / "build" / ".store"))
    status, out, errors = run("run", recipe, "-q")
    assert (status, out, errors) == (0, "build/mine\n", "")
    status, out, errors = run("-v", "run", recipe)
    assert status == 0
    assert "write onnx: begins" in errors
    assert "bits per weight" in out


def test_quantize_writes_the_recipe_that_it_stands_for(
    run: Lowbit, tiny: Callable[..., Path], tmp_path: Path, export: Callable[..., Path]
) -> None:
    model = tiny("llama", dtype="float32", tie_word_embeddings=True)
    for build in ("build", "other"):
        export("llama", Store(tmp_path / build / ".store"), dtype="float32", tie_word_embeddings=True)
    words = ("quantize", model, "--bits", "3", "--block-size", "32", "--recipe", "small.yaml")
    status, out, errors = run(*words)
    assert status == 0, errors
    assert "mnn-llm holds no float32 embedding: it is narrowed to fp16" in out
    assert "small.yaml is the recipe: change it, and `lowbit run small.yaml`" in out
    first = json.loads((tmp_path / "build" / "small" / "manifest.json").read_text("utf-8"))
    assert run("run", "small.yaml", "--build", "other")[0] == 0
    again = json.loads((tmp_path / "other" / "small" / "manifest.json").read_text("utf-8"))
    models = [name for name in first["files"] if name.startswith(("onnx/", "mnn/"))]
    assert {name: again["files"][name] for name in models} == {name: first["files"][name] for name in models}
    (tmp_path / "small.yaml").write_text("# mine", "utf-8")
    status, _, errors = run(*words)
    assert status == 2
    assert f"error: {tmp_path / 'small.yaml'}: is there and says something else. Run it" in errors
    assert (tmp_path / "small.yaml").read_text("utf-8") == "# mine"


def test_windows_is_refused_with_a_sentence(run: Lowbit, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowbit.pipeline.api

    monkeypatch.delitem(sys.modules, "lowbit.pipeline.api")
    monkeypatch.delattr(lowbit.pipeline, "api")
    monkeypatch.setattr(sys, "platform", "win32")
    status, _, errors = run("schema")
    assert status == 2
    assert errors.startswith("error: lowbit runs on Linux and macOS. On Windows, run it in WSL")
