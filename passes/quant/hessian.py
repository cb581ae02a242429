"""Second moments of a layer's inputs, and the factor of them that calibrated methods need.

All products are tiles of fixed size, one BLAS thread each, spread over the cores: results do not depend on how many there
are, as long as BLAS itself runs on one thread (`threadpoolctl.threadpool_limits(1)`).
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.passes.base import PassError
from lowbit.passes.quant.parallel import in_order

TILE = 512
WIDE_SUMS = 8192
"""Up to this K sums over tokens are kept in float64, beyond it in float32: 18944^2 values are 1.4 GB even so."""
RETRIES = 8


class Hessian:
    """The mean of x x^T over the inputs x [K] of a layer: half the Hessian of its mean squared output error.

    Attributes:
        matrix: float32 [K, K], symmetric. An input that is always zero has a one on the diagonal instead.
    """

    def __init__(self, matrix: npt.NDArray[np.float32]) -> None:
        diagonal = np.einsum("ii->i", matrix)
        diagonal[diagonal <= 0] = 1
        self.matrix = matrix
        self._lock = threading.Lock()
        self._known: dict[tuple[float, bool], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}

    @property
    def diagonal(self) -> npt.NDArray[np.float32]:
        """Mean square of each input, float32 [K]."""
        return np.ascontiguousarray(np.einsum("ii->i", self.matrix))

    @cached_property
    def order(self) -> npt.NDArray[np.intp]:
        """The inputs from the largest mean square to the smallest, int64 [K]."""
        return np.argsort(-self.diagonal, kind="stable")

    def feedback(self, damping: float, ordered: bool = False) -> npt.NDArray[np.float32]:
        """How much of an earlier weight's error each later weight takes over, float32 [K, K], above its unit diagonal.

        With H + damping * mean(diagonal) * I = R R^T, R upper triangular, it is R / diagonal(R) by columns: rounding
        weight k after adding sum_{j<k} error_j * feedback[j, k] is GPTQ (Chee et al., QuIP, arXiv:2307.13304, theorem 6),
        without the inverse that GPTQ forms. Made once; if H is not positive definite, with ten times the damping.

        Args:
            damping: share of the mean of the diagonal.
            ordered: of the weights taken in `order`.

        Raises:
            PassError: no damping helps; the inputs are NaN or infinite.
        """
        return self._factors(damping, ordered)[0]

    def solve(self, rows: npt.NDArray[Any], damping: float) -> npt.NDArray[np.float32]:
        """Return rows (H + damping * mean(diagonal) * I)^-1, float32 [rows, K]: forward and back substitution by tiles."""
        unit, pivots = self._factors(damping, False)
        found = np.array(rows, np.float32)
        k = len(unit)
        tiles = [slice(start, min(start + TILE, k)) for start in range(0, k, TILE)]
        for here in reversed(tiles):
            found[:, here] -= found[:, here.stop :] @ unit[here, here.stop :].T
            found[:, here] = found[:, here] @ np.linalg.inv(unit[here, here]).T
        found /= pivots
        for here in tiles:
            found[:, here] -= found[:, : here.start] @ unit[: here.start, here]
            found[:, here] = found[:, here] @ np.linalg.inv(unit[here, here])
        return found

    def _factors(self, damping: float, ordered: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The unit upper triangular U and the pivots D of U diagonal(D) U^T = H + damping; made once."""
        with self._lock:
            if (damping, ordered) not in self._known:
                self._known[damping, ordered] = self._factorize(damping, ordered)
            return self._known[damping, ordered]

    def _factorize(self, damping: float, ordered: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        for attempt in range(RETRIES):
            factor = self.matrix[np.ix_(self.order, self.order)] if ordered else self.matrix.copy()
            np.einsum("ii->i", factor)[...] += damping * 10**attempt * float(self.diagonal.mean())
            try:
                upper_factor(factor)
            except np.linalg.LinAlgError:
                continue
            if not np.isfinite(factor).all():
                break
            roots = np.diagonal(factor).copy()
            factor /= roots
            return factor, roots**2
        raise PassError(
            "the weights of a layer cannot be fitted to its inputs (are they NaN or infinite?): the checkpoint is "
            "damaged, or its activations overflow."
        )


class Moments:
    """Adds up x x^T over tokens, a batch at a time."""

    def __init__(self, k: int) -> None:
        self.sums = np.zeros((k, k), np.float64 if k <= WIDE_SUMS else np.float32)
        self.tokens = 0

    def add(self, x: npt.NDArray[np.float32]) -> None:
        """Count the inputs x, float32 [tokens, K], in."""
        k = x.shape[1]
        starts = range(0, k, TILE)

        def tile(start: int) -> None:
            # the lower triangle, in rows of tiles
            self.sums[start : start + TILE, : start + TILE] += x[:, start : start + TILE].T @ x[:, : start + TILE]

        for _ in in_order(tile, reversed(starts)):
            pass
        self.tokens += len(x)

    def hessian(self) -> Hessian:
        """The mean; ends the summing."""
        k = len(self.sums)
        for start in range(0, k, TILE):
            stop = min(start + TILE, k)
            self.sums[:start, start:stop] = self.sums[start:stop, :start].T
        self.sums /= max(self.tokens, 1)  # in place: at K = 18944 every copy is 1.4 GB
        matrix = self.sums.astype(np.float32, copy=False)
        # the tiles on the diagonal were summed whole, and a product is symmetric up to rounding only
        for start in range(0, k, TILE):
            part = matrix[start : start + TILE, start : start + TILE]
            part[...] = (part + part.T) / 2
        return Hessian(matrix)


def upper_factor(matrix: npt.NDArray[np.float32]) -> None:
    """Overwrite a symmetric matrix [K, K] with the upper triangular R of matrix = R R^T, from the last column to the first.

    Raises:
        numpy.linalg.LinAlgError: it is not positive definite.
    """
    size = len(matrix)
    for stop in range(size, 0, -TILE):
        start = max(0, stop - TILE)
        corner = np.linalg.cholesky(matrix[start:stop, start:stop][::-1, ::-1])[::-1, ::-1]
        matrix[start:stop, start:stop] = corner
        matrix[start:stop, :start] = 0
        panel, inverse = matrix[:start, start:stop], np.linalg.inv(corner).T

        def solve(row: int, panel: npt.NDArray[np.float32] = panel, inverse: npt.NDArray[np.float32] = inverse) -> None:
            panel[row : row + TILE] = panel[row : row + TILE] @ inverse

        def update(row: int, panel: npt.NDArray[np.float32] = panel, start: int = start) -> None:
            below = min(row + TILE, start)
            matrix[row:below, row:start] -= panel[row:below] @ panel[row:start].T

        for step in (solve, update):
            for _ in in_order(step, range(0, start, TILE)):
                pass
