"""The kernels once more as plain Python: the same source, line by line, gives the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


CASES = (
    "3-16-asym-40 or 2-16-asym-44 or 2-16-free-44 or bytes_of_one "
    "or squared_error or lsb_equals and 16 or planes_hold and 16 or exact_scale "
    "or reaches_the_largest"
)
FILES = ("methods/test_methods.py", "quant/test_pack.py", "quant/test_format.py", "quant/test_quantized_weight.py")


def test_kernels_compute_the_same_without_numba() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CASES, *(str(TESTS / name) for name in FILES)],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "[100%]" in done.stdout
