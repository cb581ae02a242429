"""Exact floats for the converter's JSON form, which prints about six decimals of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.pipeline.errors import ConvertError

Words = npt.NDArray[np.uint32]


def words_of(file: Path) -> Words:
    """An MNN file as uint32: a vector in it is its length, then its numbers (flatbuffers' internals)."""
    return np.fromfile(file, np.uint32, file.stat().st_size // 4)


def exact_values(name: str, printed: npt.NDArray[np.float64], constant: npt.NDArray[Any] | None, words: Words) -> list[float]:
    """The float32 values that `printed` ones were rounded from.

    They are those of the graph's `constant` of that name, if there is one, or a vector in the file `words` that the converter
    wrote first.

    Raises:
        ConvertError: neither holds such values.
    """
    candidates = [] if constant is None else [constant.astype(np.float32).reshape(-1)]
    for place in np.flatnonzero(words == len(printed)):
        candidates.append(words[place + 1 : place + 1 + len(printed)].view(np.float32))
    for values in candidates:
        if len(values) == len(printed) and np.allclose(values, printed, rtol=1e-4, atol=1e-6):
            return [float(value) for value in values]
    raise ConvertError(f"the converter made a float constant '{name}' that is neither in the graph nor in its own file.")
