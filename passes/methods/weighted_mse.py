"""Search each block's grid for the least squared error, each weight counted by how large its inputs are."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from passes._blocks import BlockFormat, Blocks
from passes._hessian import Hessian
from passes.methods.base import Method, needed
from passes.methods.mse import search


class WeightedMse(Method):
    """`mse` with each squared error weighted by the mean square of its input: the diagonal of X^T X.

    The cheap middle between `mse` and `gptq`, known from llama.cpp's importance matrix (its tools/imatrix/README.md): it
    spares what matters to the layer's output, but lets no weight make up for another's error.
    """

    calibrated: ClassVar[bool] = True

    def quantize(self, rows: np.ndarray, form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        return search(rows, form, needed(hessian).diagonal)
