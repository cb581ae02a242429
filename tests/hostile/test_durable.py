"""Order on the disk: whatever a rename shows is synced before, and the folders that lead to it after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.manifest import MANIFEST
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.store.shared import SharedStore
from lowbit.pipeline.store.store import RECORD, Store
from tests.running import QUIET, know_export
from tests.tiny import recipe_text

State = tuple[int, int] | frozenset[str]


@dataclass
class Disk:
    """What the disk is sure to have of the files below a folder, as far as fsync was called.

    Attributes:
        synced: what a file (size, time of the last change) or a folder (names in it) was when it was synced, by inode.
        shown: where files and folders were renamed to.
        faults: what a power cut could lose, in sentences.
    """

    root: Path
    synced: dict[int, State] = field(default_factory=dict)
    shown: list[Path] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fsync = os.fsync

        def sync(handle: int) -> None:
            fsync(handle)
            self.synced[os.fstat(handle).st_ino] = state(Path(f"/proc/self/fd/{handle}").readlink())

        monkeypatch.setattr(os, "fsync", sync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self.renaming(getattr(os, name)))

    def renaming(self, rename: Callable[..., None]) -> Callable[..., None]:
        def watched(source: Any, target: Any, **options: Any) -> None:
            here, there = Path(source), Path(target)
            if there.is_relative_to(self.root):
                self.check(here, there)
            rename(source, target, **options)
            if there.is_relative_to(self.root):
                self.shown.append(there)

        return watched

    def check(self, here: Path, there: Path) -> None:
        for path in (here, *here.rglob("*")):
            if self.synced.get(path.stat().st_ino) != state(path):
                self.faults.append(f"{there} is shown before {path} is synced")
        names = self.names(there.parent)
        if there.name == MANIFEST:
            early = {path for path in self.shown if path.parent == there.parent and path.name not in names} - {there}
            self.faults += [f"{there} is shown before the place of {path} is synced" for path in early]
        elif MANIFEST in names:
            self.faults.append(f"{there} is shown while the disk may still have the manifest of the result before")

    def names(self, folder: Path) -> frozenset[str]:
        """Names in a folder that the disk is sure to have."""
        found = self.synced.get(folder.stat().st_ino)
        return found if isinstance(found, frozenset) else frozenset()  # numbers of inodes are used again

    def check_places(self) -> None:
        """Every folder on the way to what was shown is synced with it."""
        for path in self.shown:
            while path.exists() and path != self.root:
                if path.name not in self.names(path.parent):
                    self.faults.append(f"the place of {path} is never synced")
                path = path.parent


def state(path: Path) -> State:
    if path.is_dir():
        return frozenset(item.name for item in path.iterdir())
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@pytest.fixture
def recipe(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> Recipe:
    path = tmp_path / "mine.yaml"
    passes = "narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32}"
    validate = f"validate: {{window: 32, windows: 1, text: {text}}}"
    path.write_text(recipe_text(tiny("llama"), *passes, convert="", validate=validate), "utf-8")
    return load_recipe(path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="file handles have no names here")
def test_everything_is_synced_before_it_is_shown(
    recipe: Recipe, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = know_export(recipe, store).parent
    root, url = tmp_path / "disk", f"file://{tmp_path / 'shared'}"
    root.mkdir()
    shutil.copytree(export, tmp_path / "shared" / export.name[:2] / export.name)
    disk = Disk(root)
    disk.watch(monkeypatch)
    for build in ("one", "one", "other"):  # made, published over what is there, fetched
        run_recipe(recipe, root / build, None, QUIET, SharedStore(root / build / ".store", url))
    disk.check_places()
    assert disk.faults == []
    kinds = {path.relative_to(root).parts[1] for path in disk.shown}
    assert kinds == {".store", "mine"}
    assert any("sources" in path.parts for path in disk.shown)
    assert any((path / RECORD).exists() and "other" in path.parts for path in disk.shown)
    assert sum(path.name == MANIFEST for path in disk.shown) == 3
