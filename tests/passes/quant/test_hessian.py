"""Sums over tokens, their factor and solutions with it, tile by tile, against numpy at once."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.passes.base import PassError
from lowbit.passes.quant import hessian
from lowbit.passes.quant.hessian import Hessian, Moments


def moments(k: int, tokens: int) -> tuple[Hessian, np.ndarray]:
    x = np.random.default_rng(k).standard_normal((tokens, k)).astype(np.float32)
    sums = Moments(k)
    for part in np.array_split(x, 3):
        sums.add(part)
    return sums.hessian(), (x.T.astype(np.float64) @ x) / tokens


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "TILE", 24)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("k", [5, 24, 100])
def test_moments(k: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "WIDE_SUMS", 1000 if wide else 0)
    found, expected = moments(k, 300)
    np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.matrix, found.matrix.T)


@pytest.mark.parametrize("k", [5, 24, 100])
def test_feedback_and_solution(k: int) -> None:
    found, plain = moments(k, 400)
    damped = plain + 0.01 * np.diag(plain).mean() * np.eye(k)
    lower = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(found.feedback(0.01), lower / np.diag(lower), rtol=0, atol=1e-5)
    order = np.argsort(-np.diag(found.matrix), kind="stable")
    lower = np.linalg.cholesky(damped[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(found.feedback(0.01, ordered=True), lower / np.diag(lower), rtol=0, atol=1e-5)
    rows = np.random.default_rng(0).standard_normal((7, k)).astype(np.float32)
    np.testing.assert_allclose(found.solve(rows, 0.01), rows @ np.linalg.inv(damped), rtol=1e-3, atol=1e-4)


def test_fewer_tokens_than_inputs_and_inputs_that_are_never_used() -> None:
    """A singular sum: damping makes it definite, and more of it where one step does not."""
    x = np.random.default_rng(0).standard_normal((8, 60)).astype(np.float32)
    x[:, 7] = 0
    sums = Moments(60)
    sums.add(x)
    found = sums.hessian()
    assert found.matrix[7, 7] == 1
    assert np.isfinite(found.feedback(0.01)).all()
    negative = Hessian(np.diag(np.r_[-0.5, np.ones(9)]).astype(np.float32) + 0.0)
    assert np.isfinite(negative.feedback(1e-6)).all()
    indefinite = np.eye(4, dtype=np.float32)
    indefinite[0, 1] = indefinite[1, 0] = 3
    assert np.isfinite(Hessian(indefinite).feedback(0.01)).all(), "damping was raised until it held"
    broken = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(PassError, match="NaN or infinite"):
        Hessian(broken).feedback(0.01)
