"""Arrays that are too large for memory: files that are gone when nobody holds them."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np

LARGE = 32 << 20
"""Arrays of this many bytes go to the disk, so that memory does not grow with the text."""


def scratch_array(folder: Path, shape: tuple[int, ...], dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
    """An array whose values are not set: in memory, or in a nameless file of `folder`."""
    if math.prod(shape) * np.dtype(dtype).itemsize < LARGE:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, "w+", shape=shape)
