"""One target under atheris: `python -m tests.fuzz.harness MODULE WORK [libFuzzer's options, or files to replay]`.

Coverage is that of lowbit's own code. Kernels run as plain Python here: it is seen where they branch, and an index beyond an
array is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
import tempfile
from pathlib import Path

import atheris

os.environ["NUMBA_DISABLE_JIT"] = "1"

with atheris.instrument_imports(include=["lowbit"]):
    from tests.fuzz.target import ALLOWED, Target


def main(module: str, work: str, *options: str) -> None:
    """Fuzz, from the target's seeds and what earlier runs learned, or replay files."""
    scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=work))  # the runner removes it: libFuzzer ends without a word
    with atheris.instrument_imports(include=["lowbit"]):
        target: Target = importlib.import_module(module).prepare(scratch)
    corpus = Path(work, "corpus")
    corpus.mkdir(exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)

    def attempt(data: bytes) -> None:
        with contextlib.suppress(ALLOWED):
            target.attempt(data)

    replayed = any(not option.startswith("-") for option in options)
    atheris.Setup([sys.argv[0], *options, *([] if replayed else [str(corpus)])], attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
