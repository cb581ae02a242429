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
from filelock import FileLock
from hypothesis import settings

from lowbit.pipeline.checkpoint.huggingface import Checkpoint, open_checkpoint
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.validate.dataset import validation_text
from tests.running import know_export, run_in_process
from tests.sharing import once
from tests.tiny import make_checkpoint, recipe_text, task_of, write_sparse_flagship

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

PYDOCS = Path(__file__).parent / "models" / "qwen2-pydocs"

SLOWEST = (
    "test_resume.py", "test_runner.py", "test_sequential.py", "test_families.py", "test_sweep.py", "test_frontier.py",
    "test_faults.py", "test_notebook.py", "test_wheel.py", "test_corpus.py", "test_sensitivity_fisher.py", "test_budget.py",
    "test_encoders.py", "test_api.py",
)  # fmt: skip
"""Files that take a minute or more, the longest first."""
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
"""All that this machine lends; a worker keeps to one of them, so that no library waits for a core that another has."""


def pytest_configure(config: pytest.Config) -> None:
    """One core for each worker."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and CORES:
        os.sched_setaffinity(0, {CORES[int(worker) % len(CORES)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, shared out in turn: each worker begins with its part of the list, and what is left over at the
    end, when workers take it from each other, is quick."""
    places = {name: number for number, name in enumerate(SLOWEST)}
    slow: list[list[pytest.Item]] = [[] for _ in range(WORKERS)]
    for item in sorted(items, key=lambda item: places.get(item.path.name, len(places))):
        if item.path.name in places:
            slow[places[item.path.name] % WORKERS].append(item)
    quick = [item for item in items if item.path.name not in places]
    ordered: list[pytest.Item] = []
    for worker, share in enumerate(slow, 1):
        wanted = len(items) * worker // WORKERS - len(ordered) - len(share)
        ordered += [*share, *quick[: max(wanted, 0)]]
        del quick[: max(wanted, 0)]
    items[:] = ordered + quick


Exported = Callable[..., tuple[Checkpoint, gs.Graph]]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session have in common."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Callable[..., Path]:
    """Makes tiny checkpoints, each distinct one once: `tiny("llama", tie_word_embeddings=True)`."""

    def make(kind: str = "qwen2", **options: Any) -> Path:
        name = f"{kind}-{digest(kind, options)[:12]}"
        return once(shared / "checkpoints" / name, lambda folder: make_checkpoint(folder, kind, **options))

    return make


@pytest.fixture(scope="session")
def store(shared: Path) -> Store:
    """What the runs of all tests recall, but for those that test just that."""
    return Store(shared / "store")


@pytest.fixture(scope="session")
def export(tiny: Callable[..., Path], shared: Path, store: Store) -> Callable[..., Path]:
    """Exports a tiny checkpoint for the runs that know a store; returns the float graph."""

    def make(kind: str = "qwen2", into: Store = store, **options: Any) -> Path:
        folder = tiny(kind, **options)
        text = recipe_text(folder, "remove_identities", task=options.get("task") or task_of(kind))
        recipe = once(shared / "exports" / f"{folder.name}.yaml", lambda file: file.write_text(text, "utf-8"))
        return know_export(load_recipe(recipe), into)

    return make


@pytest.fixture(scope="session")
def exported(tiny: Callable[..., Path], export: Callable[..., Path]) -> Exported:
    """A tiny checkpoint and its exported graph, freshly bound on every call."""

    def load(kind: str = "qwen2", **options: Any) -> tuple[Checkpoint, gs.Graph]:
        folder = tiny(kind, **options)
        checkpoint = open_checkpoint(folder, str(folder))
        return checkpoint, load_graph(export(kind, **options), checkpoint)

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


@pytest.fixture(scope="session")
def text(shared: Path) -> Path:
    """The beginning of the text that runs validate on: reading all of it takes a second each time."""
    beginning = validation_text(Validate(), shared)[:8000]
    return once(shared / "text.txt", lambda file: file.write_text(beginning, "utf-8"))


@pytest.fixture(scope="session")
def validate(text: Path) -> str:
    """A recipe's section for models of `tiny`."""
    return f"validate: {{window: 64, windows: 2, text: {text}}}"


@pytest.fixture(scope="session")
def results(tiny: Callable[..., Path], shared: Path, store: Store, validate: str) -> Callable[..., Path]:
    """Runs a recipe of the given passes on a tiny checkpoint, each distinct one once; returns its folder."""

    def make(*passes: str, name: str = "result", convert: str = "convert: {}", validate: str = validate, **model: Any) -> Path:
        build = shared / "results" / digest(name, passes, convert, validate, model)
        build.mkdir(parents=True, exist_ok=True)
        recipe = build / f"{name}.yaml"
        with FileLock(build / "lock"):
            if not (build / name / "manifest.json").exists():
                task = model.get("task") or task_of(model.get("kind", "qwen2"))
                text = recipe_text(tiny(**model), *passes, convert=convert, validate=validate, task=task)
                recipe.write_text(text, "utf-8")
                run_in_process(load_recipe(recipe), build, store=store)
        return build / name

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
def flagship(shared: Path) -> Callable[[], Path]:
    """DeepSeek-R1-Distill-Qwen-7B's shape: true headers over a file that takes no space."""
    return lambda: once(shared / "flagship", write_sparse_flagship)
