"""What happens to a store between runs: files lost, cut short and emptied, clocks that jump. The bytes stay the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.store.store import RECORD, Store
from tests.running import run_in_process
from tests.tiny import recipe_text

PLAIN = ("narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32}")
EVERYTHING = (
    "narrow_embedding",
    "quantize_matmul: {bits: 4, block_size: 32, include: [lm_head, '*.[qkv]_proj']}",
    "quantize_matmul: {bits: 2, block_size: 32, method: refine}",
    "finetune_blocks: {epochs: 1, batch: 4, include: ['*.mlp.*']}",
)
JUMPS = {"back to 1970": 0, "a hundred years ahead": 100 * 365 * 86400 + 1.7e9}


def write(folder: Path, checkpoint: Path, text: Path, passes: tuple[str, ...], convert: str = "") -> Recipe:
    model = shutil.copytree(checkpoint, folder / "model")
    validate = f"validate: {{window: 32, windows: 1, text: {text}}}"
    path = folder / "mine.yaml"
    path.write_text(recipe_text(model, *passes, convert=convert, validate=validate), "utf-8")
    return load_recipe(path)


Made = tuple[Recipe, Path]


@pytest.fixture(scope="module")
def once_made(tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    recipe = write(folder, tiny("llama", num_hidden_layers=1), text, PLAIN)
    run_in_process(recipe, folder / "build")
    return recipe, folder / "build"


@pytest.fixture
def made(once_made: Made, tmp_path: Path) -> Made:
    """A recipe, and a copy of the build folder after its run."""
    return once_made[0], shutil.copytree(once_made[1], tmp_path / "build")


def files(build: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((build / "mine" / "manifest.json").read_text("utf-8"))["files"]
    return {name: sha for name, sha in found.items() if name != "report.html"}


def entries(store: Path) -> list[Path]:
    return sorted(path.parent for path in store.glob(f"*/*/{RECORD}"))


def damage(path: Path, chance: random.Random) -> None:
    """Harm a file, or the whole folder that it lies in."""
    content = path.read_bytes()
    match chance.choice(["lose", "lose all", "empty", "cut", "flip"]):
        case "lose":
            path.unlink()
        case "lose all":
            shutil.rmtree(path.parent)
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "flip":
            place = chance.randrange(len(content))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])


def harmed_and_run_again(recipe: Recipe, build: Path, rounds: int) -> None:
    store, chance = build / ".store", random.Random(0)
    expected = files(build)
    for _ in range(rounds):
        present = entries(store)
        for entry in chance.sample(present, len(present) // 2):
            damage(chance.choice(sorted(entry.iterdir())), chance)
        digests = sorted(path for path in store.glob("sources/*/*") if path.is_file())
        for path in chance.sample(digests, len(digests) // 2):
            damage(path, chance)
        run_in_process(recipe, build)
        assert files(build) == expected
        assert all(Store(store).get(entry.name) for entry in entries(store))
        check_folder(build / "mine")


def test_a_store_that_loses_files(made: Made) -> None:
    harmed_and_run_again(*made, rounds=1)


@pytest.mark.slow
def test_a_store_of_every_kind_of_entry_that_loses_files(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    calibrate = f"calibrate: {{windows: 4, window: 32, text: {text}}}"
    recipe = write(tmp_path, tiny("llama", num_hidden_layers=1), text, EVERYTHING, calibrate)
    run_in_process(recipe, tmp_path / "build")
    harmed_and_run_again(recipe, tmp_path / "build", rounds=10)


def test_a_clock_that_jumps(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of files, and those that programs are told: what is made is recalled, and what is being made stays."""
    recipe, build = made
    store = build / ".store"
    expected, kept = files(build), {entry: entry.stat().st_ino for entry in entries(store)}
    for seconds in JUMPS.values():
        with Store(store).scratch() as unfinished:
            (unfinished / "codes").write_text("in the making")
            for path in (*build.rglob("*"), *(recipe.folder / "model").iterdir()):
                os.utime(path, (seconds, seconds))
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda seconds=seconds: seconds)
                run_in_process(recipe, build)
            assert (unfinished / "codes").read_text() == "in the making"
        assert files(build) == expected
        assert {entry: entry.stat().st_ino for entry in entries(store)} == kept, "nothing was made again"
