"""What `lowbit clean` removes, and what it never does."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from lowbit.pipeline.commands.clean import clean_build
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.run.workspace import locked
from lowbit.pipeline.store.store import Store


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Two results, one of a sweep, and a store with an entry."""
    build = tmp_path / "build"
    for result in (build / "mine", build / "sweep" / "mine", build / "sweep" / "mine" / "bits=4"):
        (result / "onnx").mkdir(parents=True)
        with locked(result):
            (result / "manifest.json").touch()
    (build / "compare.html").touch()

    def write(folder: Path) -> dict[str, int]:
        (folder / "made").touch()
        return {}

    Store(build / ".store").put("ab" * 32, write)
    return build


def test_everything_that_runs_made_is_gone(build: Path) -> None:
    assert clean_build(build) == []
    assert not build.exists()
    assert clean_build(build) == [], "there is nothing to do"


def test_what_no_run_made_is_left(build: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (build / "notes").mkdir()
    (build / "sweep" / "mine.txt").touch()
    (build / "mine").rename(elsewhere)
    (build / "mine").symlink_to(elsewhere)
    assert clean_build(build) == ["notes", "sweep"]
    assert [path.name for path in (build / "sweep").iterdir()] == ["mine.txt"]
    assert (elsewhere / "manifest.json").exists()


@pytest.mark.parametrize("result", ["mine", "sweep/mine", "sweep/mine/bits=4"])
def test_a_run_that_works_there_is_named(build: Path, result: str) -> None:
    before = sorted(build.rglob("*"))
    with locked(build / result), pytest.raises(PipelineError) as refused:
        clean_build(build)
    who = f"another run (process {os.getpid()} on {platform.node()}) is working here; wait for it, or stop it."
    assert str(refused.value) == f"{build / result}: {who}"
    assert sorted(build.rglob("*")) == before


def test_a_command_that_only_writes_to_the_store_is_seen(build: Path) -> None:
    with Store(build / ".store").scratch(), pytest.raises(PipelineError, match=r"\.store: another command is writing here"):
        clean_build(build)
    assert (build / "mine" / "manifest.json").exists()


def test_the_command_refuses_with_status_2(
    build: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lowbit.pipeline.__main__ import main

    monkeypatch.setattr("sys.argv", ["lowbit", "clean", "--build", str(build)])
    with locked(build / "mine"), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"error: {build / 'mine'}: another run (process {os.getpid()}" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert not build.exists()
