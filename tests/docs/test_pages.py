"""Documentation that cannot drift: every block of code in it is loaded, compiled, run or checked against the commands."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

import lowbit
from lowbit import passes
from lowbit.passes import methods
from lowbit.pipeline.__main__ import app
from lowbit.pipeline.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:make|lowbit|pip install) [^`]+)`")
FILE = re.compile(r"Write `(passes/[\w/]+\.py)`[^`]*```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A module that a page asks the reader to write."""
BASE: dict[str, Any] = {"model": "./checkpoint", "passes": [{"quantize_matmul": {"bits": 4}}]}
CALIBRATED: dict[str, Any] = {"model": "./checkpoint", "passes": [{"quantize_matmul": {"bits": 4, "method": "refine"}}]}


class Block(NamedTuple):
    place: str
    text: str


def blocks(language: str) -> list[Any]:
    """All blocks of a language, as parameters of a test."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for fence in FENCE.finditer(text):
            if fence[1] == language:
                place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, fence.start()) + 1}"
                found.append(pytest.param(Block(place, fence[2]), id=place))
    assert found, f"no page has a block of {language}"
    return found


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes and methods that pages ask the reader to write lie where they say, for a while."""
    written = {name: body for page in PAGES for name, body in FILE.findall(page.read_text("utf-8"))}
    assert {Path(name).parent.name for name in written} == {"passes", "methods"}
    for name, body in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body, "utf-8")
    for package, folder in ((passes, "passes"), (methods, "passes/methods")):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / folder)])


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_recipe_loads(block: Block, tmp_path: Path, plugins: None) -> None:
    """Parts of a recipe are loaded together with what they leave out."""
    part = yaml.safe_load(block.text)
    rest = {} if "model" in part else CALIBRATED if "calibrate" in part else BASE
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**rest, **part}, sort_keys=False), "utf-8")
    assert load_recipe(file).passes


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_compiles_and_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, block.place)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("lowbit."):
            function = getattr(lowbit, ast.unparse(node.func).removeprefix("lowbit."))
            inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords if word.arg})


def test_the_pass_of_the_documentation_passes_its_test() -> None:
    text = (ROOT / "docs" / "extending" / "pass.md").read_text("utf-8")
    names: dict[str, Any] = {}
    for language, body in FENCE.findall(text):
        if language == "python":
            exec(compile(body, "pass.md", "exec", dont_inherit=True), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_the_method_of_the_documentation_quantizes(plugins: None) -> None:
    """It keeps what it promises: rows of any length, exact scales, tails cut off."""
    import numpy as np

    from lowbit.passes.quant.format import BlockFormat
    from lowbit.passes.registry import find_method
    from tests.graphs import random

    method = find_method("clip_tails")
    rows, form = random(3, 80), BlockFormat(3, 32, False, "fp16")
    made = method.model_validate({"share": 0.05}).quantize(rows, form)
    assert made.codes.shape == (3, 96)
    assert (made.scales == made.scales.astype(np.float16)).all()
    assert (made.codes[:, 80:] == made.zero_points[:, -1:]).all()
    off = np.abs(made.dequantize(80) - rows)
    inside = off <= np.repeat(made.scales, 32, axis=1)[:, :80] * 0.51
    assert 0.8 < inside.mean() < 1
    with pytest.raises(passes.base.PassError, match="leave out symmetric: true"):
        method().quantize(rows, BlockFormat(3, 32, True, "fp16"))


@pytest.mark.parametrize(
    ("page", "recipe"), [("docs/recipes.md", "demo-q3"), ("README.md", "deepseek-r1-7b-q3-fast")], ids=["guide", "readme"]
)
def test_recipes_that_pages_explain_are_those_that_come_along(page: str, recipe: str) -> None:
    shown = yaml.safe_load(next(body for name, body in FENCE.findall((ROOT / page).read_text("utf-8")) if name == "yaml"))
    there = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text("utf-8"))
    assert {name: shown[name] for name in ("passes", "validate")} == {name: there[name] for name in ("passes", "validate")}


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


@pytest.mark.parametrize("block", blocks("bash"))
def test_every_command_exists_with_its_options(block: Block) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        check_words(words)
        if words[:1] == ["lowbit"]:  # whole: what is required is there
            command_line().commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_within_a_sentence_exists(page: Path) -> None:
    for command in INLINE.findall(page.read_text("utf-8")):
        check_words(shlex.split(command))


def check_words(words: list[str]) -> None:
    """A command of lowbit has the options that are named; a target of make and its variables are in the Makefile."""
    match words:
        case ["lowbit", name, *rest]:
            command = command_line() if name.startswith("-") else command_line().commands[name]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word.partition("=")[0] for word in [name, *rest] if word.startswith("--")} <= known, words
        case ["make", *rest]:
            makefile = (ROOT / "Makefile").read_text("utf-8")
            for word in rest:
                name, given, value = word.partition("=")
                wanted = f"$({name})" if given else f"\n{word}:"
                assert wanted in makefile or (name in "abcdefgh" and "$($(one))" in makefile), words
                if name == "recipe" and given and value != "NAME":
                    assert (ROOT / "recipes" / f"{value}.yaml").is_file(), words
        case ["pip", "install", package]:
            extra = package.removeprefix("lowbit[").removesuffix("]")
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE), words
        case _:
            assert not words, f"not a command that this test knows: {words}"


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []
