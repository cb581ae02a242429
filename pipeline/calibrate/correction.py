"""Rows of a float weight, and how far its inputs have drifted -> the rows that make up for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.passes.quant.hessian import Hessian

DAMPING = 0.01
"""Of the second moments, where a layer's weights are corrected for the errors before them."""
Floats = npt.NDArray[np.float32]


class Correction:
    """W -> W + W D^T X (X^T X)^-1, D = exact inputs - X: the least-squares weight for the float model's outputs, by rows.

    X are the inputs that the quantized layers before make. Minimizing |(X + D) W^T - X W'^T| is GPTAQ's asymmetric objective
    (Li et al., arXiv:2504.02692); solved for W' first and then rounded as any weight, it is the first step of
    Qronos (Zhang et al., arXiv:2505.11695).

    Args:
        drift: batches of (D, X), as `PairedActivations.drift` gives them.
        hessian: X^T X over the tokens.
    """

    def __init__(self, drift: list[tuple[Floats, Floats]], hessian: Hessian) -> None:
        self.drift, self.hessian = drift, hessian

    def __call__(self, rows: npt.NDArray[Any]) -> Floats:
        """The corrected rows, float32 [rows, K]."""
        w = rows.astype(np.float32)
        pull = np.zeros(w.shape, np.float32)
        for away, x in self.drift:
            pull += (away @ w.T).T @ x
        return w + self.hessian.solve(pull / np.float32(sum(len(x) for _, x in self.drift)), DAMPING)
