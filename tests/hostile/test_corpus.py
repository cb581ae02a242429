"""Every file of the corpus is refused with a sentence, reads nothing outside its folder, and takes little."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.corpus import CASES
from tests.sharing import once


@pytest.fixture(scope="session")
def outcomes(tiny: Callable[..., Path], shared: Path) -> dict[str, Any]:
    def run(scratch: Path) -> None:
        scratch.mkdir()
        command = [sys.executable, "-m", "tests.hostile.run", str(tiny("llama")), str(scratch), str(scratch / "results.json")]
        subprocess.run(command, check=True, timeout=1200)

    return dict(json.loads((once(shared / "hostile", run) / "results.json").read_text("utf-8")))


def test_there_are_forty_at_least() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_sentence(outcomes: dict[str, Any], name: str) -> None:
    found = outcomes[name]
    assert found["kind"] == "refused", found
    assert re.search(CASES[name][1], found["text"]), found["text"]
    assert not found["canary"], "it was read"
    assert not found["ran"], "code was run"
    assert "canary: nobody may read this" not in found["text"]
