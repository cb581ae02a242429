"""A tokenizer tried in a process with little time and memory: `python -m lowbit.pipeline.checkpoint.tokenizer_worker FILE`.

Its expressions may try every way to read a text, its replacements may multiply one, and its library aborts where it is out of
memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer

from lowbit.pipeline.limits import TOKENIZER_BYTES, TOKENIZER_SECONDS, limit_memory, limit_seconds

SAMPLE = "It's the year 2024; naïve 你好 👍🏽 \t\r\n  x = y[0]  # done!" * 20 + "a" * 500 + "!" + " " * 500 + "7" * 500


def _main(file: str) -> None:
    limit_seconds(TOKENIZER_SECONDS)
    limit_memory(TOKENIZER_BYTES)
    Tokenizer.from_str(Path(file).read_text("utf-8")).encode(SAMPLE)


if __name__ == "__main__":
    _main(*sys.argv[1:])
