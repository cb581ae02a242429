"""Digests of the checkpoint's tensors are remembered, and believed only if they are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests


@pytest.mark.parametrize("damage", ["", "0", "cut", "another"])
def test_a_damaged_digest_is_taken_again(tiny: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    """An empty one hashed like any other once: layers got each other's codes."""
    weights = list(open_checkpoint(tiny("llama"), "").weights.values())
    digests = SourceDigests(Store(tmp_path))
    before = [digests.of(weight) for weight in weights]
    assert [digests.known(weight) for weight in weights] == before
    files = sorted(path for path in (tmp_path / "sources").rglob("*") if path.is_file())
    texts = [path.read_text() for path in files]
    for number, path in enumerate(files):
        path.write_text({"cut": texts[number][:40], "another": texts[number - 1]}.get(damage, damage))
    assert {digests.known(weight) for weight in weights} == {None}
    assert [digests.of(weight) for weight in weights] == before
    assert [path.read_text() for path in files] == texts


def test_digests_that_the_team_did_not_sign_are_taken_again(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = next(iter(open_checkpoint(tiny("llama"), "").weights.values()))
    digests = SourceDigests(Store(tmp_path))
    before = digests.of(weight)
    monkeypatch.setenv("LOWBIT_STORE_KEY", "ours")
    assert digests.known(weight) is None
    assert digests.of(weight) == digests.known(weight) == before
    monkeypatch.setenv("LOWBIT_STORE_KEY", "theirs")
    assert digests.known(weight) is None
    monkeypatch.delenv("LOWBIT_STORE_KEY")
    assert digests.known(weight) == before
