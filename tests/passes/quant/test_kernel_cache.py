"""Compiled kernels are kept for the user, by what they are made of, where nobody else can put any."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from lowbit.passes.quant import kernel_cache
from lowbit.passes.quant.kernel_cache import PACKAGE, KernelLocator, sources_digest
from lowbit.passes.quant.pack import pack_lsb

FILE = inspect.getfile(pack_lsb.py_func)


def test_the_cache_is_the_users_and_its_key_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    locator = KernelLocator.from_function(pack_lsb.py_func, FILE)
    assert locator is not None
    folder = Path(locator.get_cache_path())
    assert folder == tmp_path / "lowbit" / "kernels" / sources_digest(Path(FILE).parent)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = kernel_cache.cache_folder()
    folder.mkdir(parents=True)
    folder.chmod(mode)
    assert KernelLocator.from_function(pack_lsb.py_func, FILE) is None, "numba keeps it beside the sources instead"


def test_another_source_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "passes" / "quant"
    folder.mkdir(parents=True)
    monkeypatch.setattr(kernel_cache, "PACKAGE", tmp_path)
    monkeypatch.setattr(kernel_cache, "SHARED", (folder,))
    keys = []
    for source in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (folder / "inlined.py").write_text(source, "utf-8")
        keys.append(sources_digest.__wrapped__(folder))
    assert keys[0] == keys[2] != keys[1]


def test_functions_of_others_are_left_to_numba() -> None:
    assert KernelLocator.from_function(pytest.fixture, inspect.getfile(pytest)) is None


def test_every_kernel_that_is_kept_is_kept_there() -> None:
    files = [file for room in ("passes", "pipeline") for file in (PACKAGE / room).rglob("*.py")]
    kept = [file for file in files if "njit(cache=True" in file.read_text("utf-8")]
    assert len(kept) > 5
    assert not [file for file in kept if "import kernel_cache" not in file.read_text("utf-8")]
