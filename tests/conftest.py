"""Fixtures that several tests share: checkpoints made once, and one export of each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import pytest
from hypothesis import settings
from rich.console import Console

from lowbit.pipeline.checkpoint.huggingface import Checkpoint, open_checkpoint
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.sections import Export
from lowbit.pipeline.run import prepare
from lowbit.pipeline.run.runner import run_recipe
from tests.tiny import make_checkpoint, recipe_text, task_of, write_sparse_flagship

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

PYDOCS = Path(__file__).parent / "models" / "qwen2-pydocs"

SLOWEST = "test_resume.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest file first: whoever gets it last makes everybody wait."""
    items.sort(key=lambda item: item.path.name != SLOWEST)


Exported = Callable[..., tuple[Checkpoint, gs.Graph]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes tiny checkpoints, each distinct one once: `tiny("llama", tie_word_embeddings=True)`."""
    made: dict[str, Path] = {}

    def make(kind: str = "qwen2", **options: Any) -> Path:
        key = repr((kind, sorted(options.items(), key=str)))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(kind), kind, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def exported(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny checkpoint and its exported graph, freshly bound on every call."""
    files: dict[Path, Path] = {}

    def load(kind: str = "qwen2", **options: Any) -> tuple[Checkpoint, gs.Graph]:
        folder = tiny(kind, **options)
        checkpoint = open_checkpoint(folder, str(folder))
        if folder not in files:
            files[folder] = tmp_path_factory.mktemp("export") / "model.onnx"
            export_graph(checkpoint, Export.model_validate({"task": options.get("task") or task_of(kind)}), files[folder])
        return checkpoint, load_graph(files[folder], checkpoint)

    return load


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export in this process: importing torch once is enough for all tests of a worker."""
    monkeypatch.setattr(prepare, "isolated", lambda function, *arguments: function(*arguments))


@pytest.fixture(scope="session")
def results(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs a recipe of the given passes on a tiny checkpoint, each distinct one once; returns its folder."""
    build = tmp_path_factory.mktemp("build")
    made: dict[str, Path] = {}

    def make(*passes: str, convert: str = "convert: {}", **model: Any) -> Path:
        key = repr((passes, convert, sorted(model.items(), key=str)))
        if key not in made:
            recipe = build / f"recipe{len(made)}.yaml"
            validation = "validate: {window: 64, windows: 2}"
            task = model.get("task") or task_of(model.get("kind", "qwen2"))
            text = recipe_text(tiny(**model), *passes, convert=convert, validate=validation, task=task)
            recipe.write_text(text, "utf-8")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(prepare, "isolated", lambda function, *arguments: function(*arguments))
                made[key] = run_recipe(load_recipe(recipe), build, None, Console(quiet=True))
        return made[key]

    return make


@pytest.fixture
def finished(results: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a finished three-bit result, to be damaged."""
    return shutil.copytree(results("narrow_embedding", "quantize_matmul: {bits: 3, block_size: 32}"), tmp_path / "result")


@pytest.fixture
def finished_embedding(results: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a finished result with a quantized embedding."""
    passes = ("quantize_embedding: {bits: 4, block_size: 32}", "quantize_matmul: {bits: 4, block_size: 32}")
    return shutil.copytree(results(*passes), tmp_path / "result")


@pytest.fixture(scope="session")
def flagship(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """DeepSeek-R1-Distill-Qwen-7B's shape: true headers over a file that takes no space."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("flagship")
        write_sparse_flagship(folder)
        return folder

    return make
