"""Slow, obvious versions of the kernels: plain numpy, one position of the block after the other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian

F32 = np.float32


def exact_scale(scale: float, zero_point: int, form: BlockFormat) -> float:
    """Round to the most significand bits that scale and offset both keep in the scale dtype."""
    precision, smallest = (11, 2.0**-24) if form.scale_dtype == "fp16" else (24, 2.0**-149)
    odd = 0 if form.free else abs((1 << (form.bits - 1)) - zero_point)
    while odd > 1 and odd % 2 == 0:
        odd //= 2
    keep = precision - (odd.bit_length() if odd > 1 else 0)
    _significand, exponent = math.frexp(scale)
    step = max(2.0 ** (exponent - keep), smallest)
    rounded = round(scale / step) * step
    return rounded if rounded else max(smallest, 2.0**-126)


def exact_scales(scales: np.ndarray, zeros: np.ndarray, form: BlockFormat) -> np.ndarray:
    found = [exact_scale(float(s), int(z), form) for s, z in zip(scales.ravel(), zeros.ravel(), strict=True)]
    return np.array(found, F32).reshape(scales.shape)


def free_grid(scales: np.ndarray, zeros: np.ndarray, form: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset rounded each for itself, the zero point computed from them."""
    rounded = in_scale_dtype(scales, form)
    offsets = in_scale_dtype((F32(form.middle) - zeros.astype(F32)) * rounded, form)
    return rounded, F32(form.middle) - offsets / rounded


def in_scale_dtype(values: np.ndarray, form: BlockFormat) -> np.ndarray:
    return np.asarray(values, F32).astype(np.float16 if form.scale_dtype == "fp16" else F32).astype(F32)


def blocks_of(rows: np.ndarray, form: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 [rows, blocks, size] padded with zeros, and which of them are real."""
    wide = rows.astype(F32)
    count, k = wide.shape
    blocks = -(-k // form.block_size)
    padded = np.zeros((count, blocks * form.block_size), F32)
    padded[:, :k] = wide
    real = np.zeros_like(padded, bool)
    real[:, :k] = True
    return padded.reshape(count, blocks, -1), real.reshape(count, blocks, -1)


def codes_of(w: np.ndarray, real: np.ndarray, scale: np.ndarray, zero: np.ndarray, form: BlockFormat) -> Blocks:
    if form.free:
        scale, zero = free_grid(scale, zero, form)
        codes = np.clip(np.rint(w / scale[..., None] + zero[..., None]), 0, form.max_code)
        codes = np.where(real, codes, np.rint(zero[..., None]).clip(0, form.max_code))
        return Blocks(codes.reshape(len(w), -1).astype(np.uint8), scale, zero)
    codes = np.clip(np.rint(w / scale[..., None]) + zero[..., None], 0, form.max_code)
    codes = np.where(real, codes, zero[..., None])
    return Blocks(codes.reshape(len(w), -1).astype(np.uint8), scale.astype(F32), zero.astype(np.uint8))


def full_range(w: np.ndarray, form: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    if form.symmetric:
        scale = np.where(-low >= high, -low, -high) / F32(form.middle)
        zero = np.full(scale.shape, F32(form.middle))
    else:
        scale = (high - low) / F32(form.max_code)
        with np.errstate(invalid="ignore", divide="ignore"):
            zero = np.where(scale > 0, np.rint(-low / scale), 0).astype(F32)
    scale = np.where(scale == 0, F32(1), scale)
    return exact_scales(scale, zero, form), zero


def rtn(rows: np.ndarray, form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
    w, real = blocks_of(rows, form)
    if form.free:
        low, high = (f(np.where(real, w, x), -1) for f, x in ((np.min, np.inf), (np.max, -np.inf)))
        scale = np.where(high > low, (high - low) / F32(form.max_code), F32(1)).astype(F32)
        return codes_of(w, real, scale, -low.astype(F32) / scale, form)
    return codes_of(w, real, *full_range(w, form), form)


def mse(rows: np.ndarray, form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
    return weighted(rows, form, np.ones(rows.shape[1], F32))


def weighted_mse(rows: np.ndarray, form: BlockFormat, hessian: Hessian) -> Blocks:
    return weighted(rows, form, np.diag(hessian.matrix))


def weighted(rows: np.ndarray, form: BlockFormat, importance: np.ndarray) -> Blocks:
    if form.free:
        return regressed(rows, weighted(rows, replace(form, zero_point="integer"), importance), form, importance)
    w, real = blocks_of(rows, form)
    worth = blocks_of(importance[None], form)[0]
    size = real.sum(-1).max()
    full, full_zero = full_range(w, form)
    best = np.full(full.shape, np.inf, F32)
    best_scale, best_zero = full.copy(), full_zero.copy()

    def steps(scale: np.ndarray, zero: np.ndarray, i: int) -> np.ndarray:
        return np.minimum(np.maximum(np.rint(w[..., i] * (F32(1) / scale)), -zero), F32(form.max_code) - zero)

    def attempt(scale: np.ndarray, zero: np.ndarray) -> None:
        error = np.zeros(full.shape, F32)
        for i in range(size):
            miss = steps(scale, zero, i) * scale - w[..., i]
            error += np.where(real[..., i], miss * miss * worth[..., i], F32(0))
        better = error < best
        best[better], best_scale[better], best_zero[better] = error[better], scale[better], zero[better]

    for factor in np.linspace(1.0, 0.4, 8, dtype=F32):
        for sign in (1, -1) if form.symmetric else (1,):
            attempt(exact_scales(full * (factor * F32(sign)), full_zero, form), full_zero)
    coarse = best_scale.copy()
    for move in (0,) if form.symmetric else (-1, 1):
        zero = np.clip(full_zero + F32(move), 0, form.max_code)
        for side in (-1, 1):
            attempt(exact_scales(coarse + full * (F32(0.3 / 7) * F32(side)), zero, form), zero)
    for _ in range(2):
        product, square = np.zeros(full.shape, F32), np.zeros(full.shape, F32)
        for i in range(size):
            step = np.where(real[..., i], steps(best_scale, best_zero, i), F32(0))
            product += step * w[..., i] * worth[..., i]
            square += step * step * worth[..., i]
        with np.errstate(invalid="ignore", divide="ignore"):
            fitted = np.where(square > 0, product / square, F32(0))
        fitted = np.where(fitted != 0, fitted, best_scale)
        attempt(exact_scales(fitted, best_zero, form), best_zero.copy())
    return codes_of(w, real, best_scale, best_zero, form)


def regressed(rows: np.ndarray, start: Blocks, form: BlockFormat, importance: np.ndarray) -> Blocks:
    """Block by block: a weighted straight line through (code, weight), the nearest codes on it, as long as that helps."""
    w, real = blocks_of(rows, form)
    worth = np.broadcast_to(blocks_of(importance[None], form)[0], w.shape)
    scales, zeros = free_grid(start.scales, start.zero_points, form)
    codes = start.codes.reshape(w.shape).astype(np.float64)
    for at in np.ndindex(scales.shape):
        x, m = w[at][real[at]].astype(np.float64), worth[at][real[at]].astype(np.float64)
        code, scale, zero = codes[at][real[at]], scales[at], zeros[at]
        error = (m * ((code - zero) * scale - x) ** 2).sum()
        for _ in range(8):
            slope = scale if len(set(code)) < 2 else np.polyfit(code - form.middle, x, 1, w=np.sqrt(m))[0]
            if slope <= 0:
                break
            slope = in_scale_dtype(slope, form)
            offset = in_scale_dtype(np.average(x - slope * (code - form.middle), weights=m), form)
            tried = slope, F32(form.middle) - offset / slope
            near = np.clip(np.rint(x / tried[0] + tried[1]), 0, form.max_code)
            found = (m * ((near - tried[1]) * tried[0] - x) ** 2).sum()
            if found >= error:
                break
            error, code, (scale, zero) = found, near, tried
        codes[at] = np.rint(zero).clip(0, form.max_code)
        codes[at][real[at]], scales[at], zeros[at] = code, scale, zero
    return Blocks(codes.reshape(len(w), -1).astype(np.uint8), scales, zeros)


def hqq(
    rows: np.ndarray, form: BlockFormat, hessian: Hessian | None = None, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01
) -> Blocks:
    w, real = blocks_of(rows, form)
    scale, zero = full_range(w, form)
    count = real.sum(-1).astype(F32)
    for _ in range(20):
        shifts, product, square = (np.zeros(scale.shape, F32) for _ in range(3))
        for i in range(w.shape[-1]):
            here, x = real[..., i], w[..., i]
            code = np.clip(np.rint(x / scale + (zero - np.rint(zero))) + np.rint(zero), F32(0), F32(form.max_code))
            error = (x - (code - zero) * scale).astype(np.float64)
            size = np.abs(error)
            with np.errstate(divide="ignore"):
                shrunk = np.where(size > 0, np.maximum(size - size ** (p - 1) / beta, 0), 0)
            target = x - np.copysign(shrunk, error).astype(F32)
            shifts += np.where(here, code - target / scale, F32(0))
            product += np.where(here, (code - zero) * target, F32(0))
            square += np.where(here, (code - zero) * (code - zero), F32(0))
        if not form.symmetric:
            zero = shifts / count
            zero = np.clip(zero if form.free else np.rint(zero), 0, form.max_code).astype(F32)
        moved = product * scale > 0
        scale[moved] = product[moved] / square[moved]
        beta *= kappa
    scale = exact_scales(scale, zero, form)
    return codes_of(w, real, scale, zero, form)


def pack_lsb(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit by bit: bit j of code i of a row is bit i * bits + j of the row's bytes, least significant first."""
    rows, count = codes.shape
    packed = np.zeros((rows, -(-count * bits // 8)), np.uint8)
    for row in range(rows):
        for i in range(count):
            for j in range(bits):
                at = i * bits + j
                packed[row, at // 8] |= ((int(codes[row, i]) >> j) & 1) << (at % 8)
    return packed


def pack_msb(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit by bit: one stream, the most significant bit of each code and byte first."""
    text = "".join(format(int(code), f"0{bits}b") for code in codes.ravel())
    text += "0" * (-len(text) % 8)
    return np.array([int(text[i : i + 8], 2) for i in range(0, len(text), 8)], np.uint8)


def score_tokens(reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Softmax written out in float64."""
    rows = []
    for r, c, target in zip(reference.astype(np.float64), candidate.astype(np.float64), targets, strict=True):
        p, q = np.exp(r - r.max()), np.exp(c - c.max())
        p, q = p / p.sum(), q / q.sum()
        kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        first = float(p.argmax()), float(q.argmax())
        rows.append([-math.log(p[target]), -math.log(q[target]), kl, float(first[0] == first[1]), *first])
    return np.array(rows)
