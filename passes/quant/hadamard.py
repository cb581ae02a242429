"""Orthogonal rotations that cost little: Hadamard matrices of many orders, applied factor by factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.passes.base import PassError

LARGEST = 128
"""Powers of two up to this are applied as one matrix product."""


@dataclass(frozen=True)
class Rotation:
    """x -> x Q with Q = diagonal(signs) H / sqrt(size), H a Hadamard matrix: orthogonal, all entries of one magnitude.

    Attributes:
        size: order of Q.
        seed: of the signs, which spread what H alone would leave in place (QuaRot, arXiv:2404.00456, randomized Hadamard).
    """

    size: int
    seed: int

    def turn(self, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Rotate each run of `size` values along the last axis; float32 [..., a multiple of size]."""
        shape = x.shape
        signs = np.random.default_rng([self.seed, self.size]).choice(np.array([-1, 1], np.float32), self.size)
        # one layout whatever the caller's: a product sums in another order where the values of a run do not lie side by side
        x = np.ascontiguousarray(x.reshape(-1, self.size), np.float32) * signs
        right = self.size
        for factor in hadamard_factors(self.size):
            right //= len(factor)
            x = np.matmul(factor.T, x.reshape(-1, len(factor), right))
        return (x.reshape(shape) / np.float32(math.sqrt(self.size))).astype(np.float32)


@cache
def hadamard_factors(size: int) -> tuple[npt.NDArray[np.float32], ...]:
    """Hadamard matrices whose Kronecker product has the order `size`, float32.

    Raises:
        PassError: Paley's two constructions over prime fields (Paley 1933) give none of that order.
    """
    twos = (size & -size).bit_length() - 1
    half = np.array([[1, 1], [1, -1]], np.float32)
    for power in range(twos, -1, -1):
        first = _paley(size >> power)
        if first is not None:
            merged: list[npt.NDArray[np.float32]] = []
            for _ in range(power):
                if merged and len(merged[-1]) < LARGEST:
                    merged[-1] = np.kron(merged[-1], half)
                else:
                    merged.append(half)
            return tuple(factor for factor in (first, *merged) if len(factor) > 1) or (first,)
    raise PassError(
        f"no Hadamard matrix of order {size} is known here: it must be a power of two times 1, 12, 20, 28 or the like."
    )


def _paley(order: int) -> npt.NDArray[np.float32] | None:
    """A Hadamard matrix of `order` by Paley's first or second construction, or None."""
    if order == 1:
        return np.ones((1, 1), np.float32)
    if order % 4 == 0 and (order - 1) % 4 == 3 and _is_prime(order - 1):
        skew = _border(_jacobsthal(order - 1), -1)
        return (skew + np.eye(order)).astype(np.float32)
    half = order // 2
    if order % 4 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        core = _border(_jacobsthal(half - 1), 1)
        return (np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(half), [[1, -1], [-1, -1]])).astype(np.float32)
    return None


def _jacobsthal(q: int) -> npt.NDArray[np.int64]:
    """Q[i, j] = Legendre symbol of i - j modulo the prime q."""
    squares = {i * i % q for i in range(1, q)}
    symbol = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
    return np.asarray(symbol[(np.arange(q)[:, None] - np.arange(q)) % q])


def _border(core: npt.NDArray[np.int64], below: int) -> npt.NDArray[np.int64]:
    found = np.zeros((len(core) + 1, len(core) + 1), np.int64)
    found[0, 1:], found[1:, 0], found[1:, 1:] = 1, below, core
    return found


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
