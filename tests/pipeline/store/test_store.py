"""The store: whole entries or none, damage is noticed, a full disk is a sentence."""

from __future__ import annotations

import hmac
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.shared import SharedStore, store_at
from lowbit.pipeline.store.store import Store, writing

KEY = digest("a key")


def fill(folder: Path) -> dict[str, Any]:
    (folder / "codes").write_bytes(b"12345")
    return {"mse": 0.5}


def test_an_entry_is_recalled_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(KEY) is None
    store.put(KEY, fill)
    found = store.get(KEY)
    assert found is not None
    assert (found.facts, found.file("codes").read_bytes()) == ({"mse": 0.5}, b"12345")
    assert store.has(KEY)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).put(KEY, fail)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("file", ["codes", "entry.json"])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_one_changed_byte_is_noticed(tmp_path: Path, file: str, position: int) -> None:
    store = Store(tmp_path)
    path = store.put(KEY, fill).file(file)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))
    assert store.get(KEY) is None
    store.put(KEY, fill)
    assert store.get(KEY) is not None


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEY, fill).file("codes").unlink()
    assert store.get(KEY) is None


@pytest.mark.parametrize("change", [{"mse": 0.4}, {}, {"mse": 0.5, "more": 1}])
def test_changed_facts_are_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    record = Store(tmp_path).put(KEY, fill).file("entry.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"facts": change}))
    assert Store(tmp_path).get(KEY) is None


def test_a_file_too_many_and_a_link_are_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.put(KEY, fill).folder / "more").write_text("x")
    assert store.get(KEY) is None
    codes = store.put(KEY, fill).file("codes")
    codes.rename(tmp_path / "elsewhere")
    codes.symlink_to(tmp_path / "elsewhere")
    assert store.get(KEY) is None


def test_what_running_processes_make_stays_and_what_killed_ones_left_goes(tmp_path: Path) -> None:
    """Whoever holds the lease is asked by its lock, not by a process number, which means nothing on another host."""
    program = (
        "import sys, time; from pathlib import Path; from lowbit.pipeline.store.lease import Lease;"
        "lease = Lease(Path(sys.argv[1])); (lease.folder / 'codes').write_text('x');"
        "print(lease.folder, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())  # type: ignore[union-attr]
        Store(tmp_path).sweep()
        assert (folder / "codes").exists()
        process.kill()
        process.wait()
        Store(tmp_path).sweep()
    assert not list(tmp_path.glob(".tmp-*"))


def test_sweeping_in_another_pid_namespace_removes_nothing(tmp_path: Path) -> None:
    """As of two containers that share a store: there, this process has no number at all."""
    program = (
        "import sys; from pathlib import Path; from lowbit.pipeline.store.store import Store; Store(Path(sys.argv[1])).sweep()"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program, str(tmp_path)]
    with Store(tmp_path).scratch() as folder:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "unshare" in done.stderr:
            pytest.skip(f"no namespaces here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        assert folder.exists()


def test_the_same_key_twice_keeps_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEY, fill)
    store.put(KEY, fill)
    assert len(list(tmp_path.rglob("entry.json"))) == 1


def test_what_is_made_again_takes_the_place_of_what_is_damaged(tmp_path: Path) -> None:
    """A key that is known only after its files are written: nobody looked at the entry that lies there before."""
    store = Store(tmp_path)
    store.put(KEY, fill).file("codes").write_bytes(b"other")
    assert store.put(KEY, fill).file("codes").read_bytes() == b"12345"


def test_a_full_disk_is_a_sentence_and_loses_nothing(small_disk: Path) -> None:
    store = Store(small_disk)
    store.put(KEY, fill)

    def flood(folder: Path) -> dict[str, Any]:
        (folder / "codes").write_bytes(b"x" * (8 << 20))
        return {}

    with pytest.raises(PipelineError, match="the disk is full. What was finished is kept"):
        store.put(digest("another"), flood)
    assert store.get(KEY) is not None
    assert not list(small_disk.rglob(".tmp-*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PipelineError, match="cannot write here"), writing(tmp_path):
        (tmp_path / "file" / "below").mkdir()


def test_machines_share_a_store(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'shared'}"
    one, other = SharedStore(tmp_path / "one", url), SharedStore(tmp_path / "other", url)

    def write(folder: Path) -> dict[str, int]:
        (folder / "codes").write_bytes(b"1234")
        return {"answer": 42}

    key = digest("shared")
    assert one.get(key) is None
    one.put(key, write)
    assert other.has(key)
    fetched = other.get(key)
    assert fetched is not None
    assert (fetched.facts, fetched.file("codes").read_bytes()) == ({"answer": 42}, b"1234")
    assert fetched.folder.is_relative_to(tmp_path / "other")
    assert Store(tmp_path / "other").has(key)  # kept, too
    assert not list((tmp_path / "other").glob(".tmp-*"))


def test_a_damaged_entry_of_another_machine_is_made_anew(tmp_path: Path) -> None:
    url, key = f"file://{tmp_path / 'shared'}", digest("shared")
    one, other = SharedStore(tmp_path / "one", url), SharedStore(tmp_path / "other", url)
    one.put(key, lambda folder: {"size": (folder / "codes").write_bytes(b"1234")})
    next((tmp_path / "shared").rglob("codes")).write_bytes(b"1235")
    assert other.get(key) is None
    assert not other.has(key)
    other.put(key, lambda folder: {"size": (folder / "codes").write_bytes(b"1234")})
    third = SharedStore(tmp_path / "third", url)
    assert third.get(key) is not None
    third.remove(third.get(key))  # type: ignore[arg-type]
    assert not third.has(key)
    third.local.put(key, lambda folder: {})
    assert not other.local.root.samefile(third.root)
    assert not SharedStore(tmp_path / "fourth", url).has(key)  # what is local stays here


def test_places_of_stores(tmp_path: Path) -> None:
    assert store_at(tmp_path, None) == Store(tmp_path / ".store")
    assert store_at(tmp_path, "elsewhere") == Store(Path("elsewhere"))
    assert store_at(tmp_path, "memory://x") == SharedStore(tmp_path / ".store", "memory://x")
    with pytest.raises(PipelineError, match="--store nonsense://x: Protocol not known: nonsense"):
        store_at(tmp_path, "nonsense://x").get(digest("x"))


def test_entries_that_the_team_did_not_sign_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put(KEY, fill)
    monkeypatch.setenv("LOWBIT_STORE_KEY", "ours")
    assert store.get(KEY) is None, "not signed"
    entry = store.put(KEY, fill)
    assert store.get(KEY) == entry
    record = json.loads(entry.file("entry.json").read_text("utf-8"))
    assert record["signature"] == hmac.new(b"ours", record["seal"].encode(), "sha256").hexdigest()
    for wrong in ("0" * 64, "", None, 5, "\u00e9"):
        entry.file("entry.json").write_text(json.dumps(record | {"signature": wrong}), "utf-8")
        assert store.get(KEY) is None
        entry = store.put(KEY, fill)
    monkeypatch.setenv("LOWBIT_STORE_KEY", "theirs")
    assert store.get(KEY) is None, "signed by another key"
    store.put(KEY, fill)
    monkeypatch.delenv("LOWBIT_STORE_KEY")
    assert store.get(KEY) is not None, "without a key signatures are not looked at"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_store_that_is_only_read(tmp_path: Path, scheme: str) -> None:
    there = Store(tmp_path / "there")
    damaged, wrong, mine = digest("damaged"), digest("wrong"), digest("mine")
    for key in (KEY, damaged, wrong):
        there.put(key, fill)
    (there.root / damaged[:2] / damaged / "codes").write_bytes(b"other")
    before = {path: path.read_bytes() for path in there.root.rglob("*") if path.is_file()}
    store = store_at(tmp_path / "build", f"ro:{scheme}{there.root}")
    found = store.get(KEY)
    assert found is not None
    assert found.folder.is_relative_to(tmp_path / "build")
    store.put(mine, fill)
    assert store.get(damaged) is None
    refused = store.get(wrong)
    assert refused is not None
    store.remove(refused)
    assert store.get(wrong) is None, "what was refused once is not taken again"
    store.put(wrong, fill)
    assert store.get(wrong) is not None, "but made here"
    assert {path: path.read_bytes() for path in there.root.rglob("*") if path.is_file()} == before
