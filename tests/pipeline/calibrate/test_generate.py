"""Generated text: a run that was stopped goes on after the last batch that it kept, to the same text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.pipeline.calibrate.dataset import calibration_windows
from lowbit.pipeline.checkpoint.huggingface import Checkpoint, open_checkpoint
from lowbit.pipeline.recipe.sections import Calibrate
from lowbit.pipeline.store.store import RECORD, Draft, Entry, Store

WINDOWS, BATCHES = 85, 3
"""Of 32 texts each, so that texts of the full length fill two batches and a half."""


class Stop(BaseException):
    """What nobody catches."""


@dataclass(frozen=True)
class Counting(Store):
    """A store that tells what it kept, and stops where it would keep more than it may."""

    may: int = 99
    kept: list[str] = field(default_factory=list)

    def finish(self, key: str, draft: Draft) -> Entry:
        if len(self.kept) == self.may:
            raise Stop
        self.kept.append(key)
        return super().finish(key, draft)


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(tiny(), "tiny")


def text(checkpoint: Checkpoint, store: Store, windows: int = WINDOWS) -> npt.NDArray[np.int64]:
    options = Calibrate(text="generated", windows=windows, window=16)
    return calibration_windows(options, store.root, checkpoint, "model", store)


def test_what_was_written_before_a_stop_is_not_written_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = text(checkpoint, whole := Counting(tmp_path / "whole"))
    assert len(whole.kept) == BATCHES + 1, "no batch is written in vain"
    for batch in range(BATCHES):
        with pytest.raises(Stop):
            text(checkpoint, store := Counting(tmp_path / "stopped", may=1))
        assert len(list(store.root.glob(f"*/*/{RECORD}"))) == batch + 1
    np.testing.assert_array_equal(text(checkpoint, last := Counting(tmp_path / "stopped")), expected)
    assert len(last.kept) == 1, "only the windows: all of their text was there"
    more = text(checkpoint, last, WINDOWS + 32)
    np.testing.assert_array_equal(more[:WINDOWS], expected)
    assert len(last.kept) == 3, "a longer text is the same one, continued"


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: data.replace(b"1", b"2", 1), lambda data: b""])
def test_only_a_damaged_batch_is_written_again(
    checkpoint: Checkpoint, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store = Counting(tmp_path)
    expected = text(checkpoint, store)
    *batches, windows = store.kept
    store.remove(store.get(windows) or pytest.fail("the windows are kept"))
    record = tmp_path / batches[1][:2] / batches[1] / RECORD
    record.write_bytes(damage(record.read_bytes()))
    np.testing.assert_array_equal(text(checkpoint, again := Counting(tmp_path)), expected)
    assert again.kept == [batches[1], windows]
