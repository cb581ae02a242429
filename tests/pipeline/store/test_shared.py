"""Machines that share a store: uploads that are cut off, and two that make the same at the same time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.shared import SharedStore
from lowbit.pipeline.store.store import RECORD, Entry

ROOT = Path(__file__).parents[3]
KEY = digest("a key")


class Stop(BaseException):
    """What nobody catches."""


def fill(folder: Path) -> dict[str, Any]:
    (folder / "codes").write_bytes(b"12345")
    (folder / "scales").write_bytes(b"67")
    return {"mse": 0.5}


def is_whole(entry: Entry | None) -> bool:
    return entry is not None and entry.facts == {"mse": 0.5} and entry.file("scales").read_bytes() == b"67"


Share = Callable[[str], SharedStore]


@pytest.fixture
def share(tmp_path: Path) -> Share:
    return lambda name: SharedStore(tmp_path / name, f"file://{tmp_path / 'shared'}")


@pytest.mark.parametrize("sent", [0, 1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_an_upload_that_is_cut_off(share: Share, monkeypatch: pytest.MonkeyPatch, sent: int, half: bool) -> None:
    """Whole files are sent, perhaps half of the next one, and the run is killed: nobody takes it, and it is sent later."""
    put, calls = LocalFileSystem.put_file, []

    def cut_off(self: LocalFileSystem, source: str, target: str) -> None:
        calls.append(target)
        if len(calls) > sent:
            if half:
                Path(target).write_bytes(Path(source).read_bytes()[:-1])
            raise Stop
        put(self, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", cut_off)
        with pytest.raises(Stop):
            share("one").put(KEY, fill)
    assert share("reader").get(KEY) is None
    assert is_whole(share("one").get(KEY))
    assert is_whole(share("reader").get(KEY)), "what was cut off is sent when it is recalled"
    assert not list((share("one").root / "unsent").iterdir())


def test_what_was_cut_off_is_made_by_another_machine(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            share("one").put(KEY, fill)
    share("other").put(KEY, fill)
    assert is_whole(share("one").get(KEY))
    assert is_whole(share("reader").get(KEY))


def test_an_entry_that_is_removed_while_it_is_fetched_or_sent(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    share("one").put(KEY, fill)

    def gone(*_: object) -> None:
        share("other").remove(Entry(Path(KEY), {}, {}))
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "get_file", gone)
        assert share("reader").get(KEY) is None
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", gone)
        assert is_whole(share("sender").put(KEY, fill))
    assert is_whole(share("sender").get(KEY))
    assert share("reader").has(KEY)


WORK = """
import sys
from pathlib import Path
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.shared import SharedStore

def fill(folder):
    for name in ("codes", "scales"):
        (folder / name).write_bytes(name.encode() * 50_000)
    return {"mse": 0.5}

store = SharedStore(Path(sys.argv[1]), sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    if store.get(digest(number)) is None:
        store.put(digest(number), fill)
"""


def test_two_hosts_make_the_same_at_the_same_time(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'shared'}"
    pipe: Any = subprocess.PIPE
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(tmp_path / name), url], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe
        )
        for name in ("one", "one", "other")  # two runs on one host, too
    ]
    for host in hosts:
        assert host.stdout is not None
        host.stdout.readline()
    assert [host.communicate(b"go\n")[1].decode() for host in hosts] == ["", "", ""]
    for name in ("one", "other", "third"):
        store = SharedStore(tmp_path / name, url)
        entries = [store.get(digest(number)) for number in range(60)]
        assert {entry.file("codes").stat().st_size for entry in entries if entry} == {250_000}
        assert all(entries)
        assert not list(store.root.glob(".tmp-*"))
    assert len(list((tmp_path / "shared").glob(f"*/*/{RECORD}"))) == 60
