"""The figures of a comparison against softmax written out."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.pipeline.convert.engine_process import token_losses
from lowbit.pipeline.validate.metrics import relative_error, score_tokens, summarize
from tests import reference


def test_scores_equal_the_reference() -> None:
    rng = np.random.default_rng(0)
    ref = (rng.standard_normal((40, 50)) * 5).astype(np.float32)
    cand = ref + rng.standard_normal((40, 50)).astype(np.float32)
    targets = rng.integers(0, 50, 40)
    np.testing.assert_allclose(
        score_tokens(ref, cand, targets), reference.score_tokens(ref, cand, targets), rtol=1e-6, atol=1e-6
    )
    same = score_tokens(ref, ref, targets)
    assert same[:, 2].max() == 0
    assert same[:, 3].min() == 1


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1000.0, 0.0, -1000.0]], np.float32)
    found = score_tokens(logits, logits, np.array([1]))
    assert found[0].tolist() == [1000.0, 1000.0, 0.0, 1.0, 0.0, 0.0]


def test_summary() -> None:
    scores = np.array([[[1.0, 2.0, 0.1, 1.0], [3.0, 2.0, 0.3, 0.0]], [[1.0, 1.0, 0.9, 1.0], [1.0, 1.0, 0.5, 1.0]]])
    found = summarize(scores)
    assert found.reference_perplexity == pytest.approx(np.exp(1.5))
    assert found.perplexity == pytest.approx(np.exp(1.5))
    assert (found.tokens, found.worst_window, found.top1_agreement) == (4, 1, 0.75)
    assert found.worst_window_kl == pytest.approx(0.7)
    assert found.kl_divergence == pytest.approx(0.45)
    assert found.kl_by_position == pytest.approx([0.5, 0.4])


def test_token_losses_are_the_same_likelihoods() -> None:
    logits = np.random.default_rng(1).standard_normal((6, 9)).astype(np.float32)
    ids = [1, 2, 3, 4, 5, 6]
    expected = score_tokens(logits[:-1], logits[:-1], np.array(ids[1:]))[:, 0]
    np.testing.assert_allclose(token_losses(logits, ids), expected, rtol=1e-6)


def test_the_relative_error_of_zeros_is_no_accident() -> None:
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert relative_error(zeros, zeros) == 0.0
    assert relative_error(ones, zeros) > 1e30
    assert relative_error(1.5 * ones, ones) == pytest.approx(0.5)
