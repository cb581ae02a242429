"""Keys hold the source that runs: neither more (a reworded message) nor less (a kernel, a plug-in's helper)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.passes.methods.mse import Mse
from lowbit.passes.methods.rtn import Rtn
from lowbit.pipeline.calibrate.sequential import calibrate
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.store.source_digest import reached, source_digest

ROOT = Path(__file__).parents[3]
MODULE = '''"""A module."""
from lowbit.passes.base import PassError
import helper
from other import used, unused

SIZE = 3

def root(x: int) -> int:
    """Add."""
    if x < 0:
        raise PassError(f"{x} is negative.")
    return within(x) + SIZE + helper.shift(x)  # a comment

def within(x):
    from late import later
    return used(x) + later(x)

def neighbor(x):
    return x
'''
HELPERS = {
    "helper": "def shift(x):\n    return x << 1\n",
    "other": "def used(x):\n    return x\n\ndef unused(x):\n    return x\n",
    "late": "def later(x):\n    return -x\n",
}


@pytest.fixture
def digest_of(tmp_path: Path) -> Callable[..., str]:
    """Digest of `plugin.root`, some words of its module or of its helpers replaced."""

    def find(*changes: tuple[str, str, str]) -> str:
        files = {"plugin": MODULE} | HELPERS
        for name, old, new in changes:
            assert old in files[name]
            files[name] = files[name].replace(old, new)
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        program = (
            "from lowbit.pipeline.store.source_digest import source_digest; import plugin; print(source_digest(plugin.root))"
        )
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout

    return find


def test_only_what_can_change_a_result_counts(digest_of: Callable[..., str]) -> None:
    before = digest_of()
    for change in (
        ("plugin", "{x} is negative.", "{x} is below zero; take another."),
        ("plugin", "# a comment", "# another"),
        ("plugin", "Add.", "Add up."),
        ("plugin", "x: int) -> int", "x: float) -> float"),
        ("plugin", "def neighbor(x):\n    return x", "def neighbor(x):\n    return 2 * x"),
        ("other", "def unused(x):\n    return x", "def unused(x):\n    return 2 * x"),
    ):
        assert digest_of(change) == before, change


def test_whatever_can_change_a_result_counts(digest_of: Callable[..., str]) -> None:
    """Constants, what is called, what is looked up in a module, and what only a function imports."""
    digests = [digest_of()]
    for change in (
        ("plugin", "SIZE = 3", "SIZE = 4"),
        ("plugin", "return used(x) + later(x)", "return used(x) - later(x)"),
        ("plugin", "if x < 0", "if x <= 0"),
        ("helper", "x << 1", "x << 2"),
        ("other", "def used(x):\n    return x", "def used(x):\n    return 2 * x"),
        ("late", "return -x", "return x"),
    ):
        digests.append(digest_of(change))
    assert len(set(digests)) == len(digests)


def test_code_that_cannot_be_read_is_refused() -> None:
    """As of a class that was typed into a notebook: nobody could tell when it changes."""
    typed: dict[str, Any] = {"__name__": "__main__"}
    exec("def mine(x):\n    return x\n", typed)
    with pytest.raises(PipelineError, match="the source of mine in '__main__' cannot be read"):
        source_digest(typed["mine"])


def test_what_a_method_and_a_step_reach() -> None:
    assert source_digest(Mse) != source_digest(Rtn)
    code = reached(Mse)
    assert {
        "lowbit.passes.methods.mse.search",
        "lowbit.passes.methods.mse._kernel",
        "lowbit.passes.methods.mse.FACTORS",
    } <= set(code)
    assert "lowbit.passes.methods.rtn.full_range" in code
    assert "lowbit.passes.methods.rtn.Rtn" not in code
    assert {"lowbit.passes.quant.hessian.Hessian.__init__", "numba"}.isdisjoint(code)
    assert "lowbit.pipeline.export.torch_patches.weightless_export" in reached(export_graph)
    assert not [name for name in reached(calibrate) if name.startswith("lowbit.pipeline.report")]


def test_a_reworded_message_runs_nothing_again_and_a_kernel_its_weights(tmp_path: Path) -> None:
    """In a copy of this project, keys are taken after a message, then a kernel was changed."""
    for name in ("lowbit", "passes", "pipeline"):
        shutil.copytree(ROOT / name, tmp_path / "lowbit" / ("" if name == "lowbit" else name), dirs_exist_ok=True)
    program = (
        "from lowbit.passes.methods.mse import Mse; from lowbit.passes.methods.hqq import Hqq;"
        "from lowbit.passes.quantize_matmul import QuantizeMatmul; from lowbit.pipeline.calibrate.sequential import calibrate;"
        "from lowbit.pipeline.store.source_digest import source_digest;"
        "print(*map(source_digest, (Mse, Hqq, QuantizeMatmul, calibrate)))"
    )

    def keys() -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-P", "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.split()

    before = keys()
    message, kernel = tmp_path / "lowbit/passes/quantize_matmul.py", tmp_path / "lowbit/passes/methods/mse.py"
    assert "nothing to quantize: " in message.read_text()
    message.write_text(message.read_text().replace("nothing to quantize: ", "there is nothing to quantize: "))
    assert keys() == before
    assert "REFITS = 2" in kernel.read_text()
    kernel.write_text(kernel.read_text().replace("REFITS = 2", "REFITS = 3"))
    after = keys()
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True, True]
