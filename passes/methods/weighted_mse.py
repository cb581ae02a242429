"""Search each block's grid for the least squared error, each weight counted by how large its inputs are."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy.typing as npt

from lowbit.passes.methods.mse import search
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method, needed


class WeightedMse(Method):
    """`mse` with each squared error weighted by the mean square of its input: the diagonal of X^T X.

    The cheap middle between `mse` and `gptq`, known from llama.cpp's importance matrix (its tools/imatrix/README.md): it
    spares what matters to the layer's output, but lets no weight make up for another's error.
    """

    calibrated: ClassVar[bool] = True

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        return search(rows, form, needed(hessian).diagonal)
