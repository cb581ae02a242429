"""Slow, obvious versions of the kernels: plain numpy, one position of the block after the other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from passes._blocks import BlockFormat, Blocks
from passes._hessian import Hessian

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


def gptq(rows: np.ndarray, form: BlockFormat, hessian: Hessian, damping: float = 0.01, ordered: bool = False) -> Blocks:
    """As the paper has it (arXiv:2210.17323, algorithm 1): the Cholesky factor of the inverse, weights updated in place."""
    w = rows.astype(np.float64)
    k, size = w.shape[1], form.block_size
    h = hessian.matrix.astype(np.float64)
    importance = np.diag(h).astype(F32)
    h = h + damping * np.mean(np.diag(h)) * np.eye(k)
    order = np.argsort(-importance, kind="stable") if ordered else np.arange(k)
    upper = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    found = weighted(rows, form, importance)
    codes, scales, zeros = found.codes, found.scales, found.zero_points
    w = w[:, order]
    for i, column in enumerate(order):
        block = column // size
        if not ordered and column % size == 0:
            here = slice(column, min(column + size, k))
            grid = weighted(w[:, here].astype(F32), form, importance[here])
            scales[:, block], zeros[:, block] = grid.scales[:, 0], grid.zero_points[:, 0]
            codes[:, block * size : (block + 1) * size] = np.rint(zeros[:, block, None]).clip(0, form.max_code)
        scale, zero = scales[:, block].astype(np.float64), zeros[:, block].astype(np.float64)
        code = np.clip(np.rint(w[:, i] / scale + zero), 0, form.max_code)
        codes[:, column] = code
        error = (w[:, i] - (code - zero) * scale) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return found


def refine(rows: np.ndarray, form: BlockFormat, hessian: Hessian, sweeps: int = 4, damping: float = 0.01) -> Blocks:
    """Coordinate by coordinate, the whole error of a row computed anew for every candidate."""
    found = gptq(rows, form, hessian)
    k, size = rows.shape[1], form.block_size
    h = hessian.matrix.astype(np.float64)
    h = h + damping * np.mean(np.diag(h)) * np.eye(k)

    if form.free:
        return refine_free(rows, found, form, h, sweeps)

    def loss(w: np.ndarray, steps: np.ndarray, scale: np.ndarray) -> float:
        e = w - steps * np.repeat(scale, size)[:k]
        return float(e @ h @ e)

    for row, w in enumerate(rows.astype(np.float64)):
        codes, scale, zero = (a[row].astype(np.float64) for a in (found.codes, found.scales, found.zero_points))
        for _ in range(sweeps):
            for block in range(form.block_count(k)):
                here = range(block * size, min((block + 1) * size, k))
                start = (codes[:k] - np.repeat(zero, size)[:k], scale.copy(), zero[block])
                best, best_loss = start, loss(w, *start[:2])
                for shift in (0,) if form.symmetric else (-1, 0, 1):
                    new = zero[block] + shift
                    if not 0 <= new <= form.max_code:
                        continue
                    steps, tried = start[0].copy(), scale.copy()
                    steps[list(here)] -= shift
                    tried[block] = exact_scale(float(tried[block]), int(new), form)
                    own = np.zeros(k)
                    own[list(here)] = steps[list(here)]
                    rest = w - (steps - own) * np.repeat(tried, size)[:k]
                    if own @ h @ own > 0:
                        fitted = tried.copy()
                        fitted[block] = exact_scale(float(own @ h @ rest / (own @ h @ own)), int(new), form)
                        if fitted[block] * tried[block] > 0 and loss(w, steps, fitted) < loss(w, steps, tried):
                            tried = fitted
                    for i in here:
                        options = [steps.copy() for _ in range(form.max_code + 1)]
                        for code, option in enumerate(options):
                            option[i] = code - new
                        steps = min(options, key=lambda option, tried=tried: loss(w, option, tried))
                    if loss(w, steps, tried) < best_loss:
                        best, best_loss = (steps, tried, new), loss(w, steps, tried)
                steps, scale, zero[block] = best
                codes[:k] = steps + np.repeat(zero, size)[:k]
                codes[here.stop : (block + 1) * size] = zero[block]
        found.codes[row], found.scales[row], found.zero_points[row] = codes, scale, zero
    return found


def refine_free(rows: np.ndarray, found: Blocks, form: BlockFormat, h: np.ndarray, sweeps: int) -> Blocks:
    """`refine` where scale and zero point are both fitted, by numpy's least squares."""
    k, size, root = rows.shape[1], form.block_size, np.linalg.cholesky(h).T
    for row, w in enumerate(rows.astype(np.float64)):
        codes, scale, zero = (a[row].astype(np.float64) for a in (found.codes, found.scales, found.zero_points))

        def loss(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, w: np.ndarray = w) -> float:
            e = w - ((codes.reshape(-1, size) - zero[:, None]) * scale[:, None]).reshape(-1)[:k]
            return float(e @ h @ e)

        for _ in range(sweeps):
            for block in range(form.block_count(k)):
                here = range(block * size, min((block + 1) * size, k))
                new, tried = codes.copy(), (scale.copy(), zero.copy())
                rest = codes.copy().reshape(-1, size) - zero[:, None]
                rest[block] = 0
                wanted = w - (rest * scale[:, None]).reshape(-1)[:k]
                columns = np.zeros((k, 2))
                columns[list(here), 0], columns[list(here), 1] = codes[list(here)] - form.middle, 1
                (slope, _), _, rank, _ = np.linalg.lstsq(root @ columns, root @ wanted, rcond=1e-6)
                if rank == 2 and slope > 0:
                    slope = in_scale_dtype(slope, form)
                    ones, left = root @ columns[:, 1], root @ (wanted - slope * columns[:, 0])
                    fitted = tried[0].copy(), tried[1].copy()
                    fitted[0][block] = slope
                    fitted[1][block] = F32(form.middle) - in_scale_dtype(ones @ left / (ones @ ones), form) / slope
                    tried = fitted if loss(codes, *fitted) < loss(codes, *tried) else tried
                for i in here:
                    options = [new.copy() for _ in range(form.max_code + 1)]
                    for code, option in enumerate(options):
                        option[i] = code
                    new = min(options, key=lambda option, tried=tried: loss(option, *tried))
                if loss(new, *tried) < loss(codes, scale, zero):
                    codes, (scale, zero) = new, tried
        codes[k:] = np.rint(zero[-1]).clip(0, form.max_code)
        found.codes[row], found.scales[row], found.zero_points[row] = codes, scale, zero
    return found


def awq(rows: np.ndarray, form: BlockFormat, hessian: Hessian, shares: int = 10, least: float = 0.5) -> Blocks:
    """Row by row and block by block, each clipped copy rounded to nearest on its own."""
    k, size = rows.shape[1], form.block_size
    h = hessian.matrix.astype(np.float64)
    parts = []
    for row in rows.astype(F32):
        for start in range(0, k, size):
            w, own = row[start : start + size], h[start : start + size, start : start + size]
            limits = [np.abs(w).max() * F32(1 - (1 - least) * i / shares) for i in range(shares)]
            found = [rtn(np.clip(w, -limit, limit)[None], form) for limit in limits]
            away = [one.dequantize(len(w))[0].astype(np.float64) - w for one in found]
            parts.append(found[int(np.argmin([e @ own @ e for e in away]))])
    names = ("codes", "scales", "zero_points")
    return Blocks(*(np.concatenate([getattr(one, name) for one in parts], 1).reshape(len(rows), -1) for name in names))


def signround(rows: np.ndarray, form: BlockFormat, hessian: Hessian, iterations: int = 200, damping: float = 0.01) -> Blocks:
    """The paper's forward pass, its gradients left to torch, rounding passed straight; float64."""
    import torch

    def straight(x: torch.Tensor) -> torch.Tensor:
        return x + (torch.round(x) - x).detach()

    w, real = (torch.from_numpy(a) for a in blocks_of(rows, form))
    w, k = w.double(), rows.shape[1]
    h = torch.from_numpy(hessian.matrix.astype(np.float64))
    h = h + damping * torch.diag(h).mean() * torch.eye(k)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    offset = torch.zeros_like(w, requires_grad=True)
    lower, upper = (torch.ones_like(low, requires_grad=True) for _ in range(2))
    best: list[tuple[float, Blocks | None]] = [(math.inf, None)] * len(rows)
    for step in range(iterations + 1):
        if form.symmetric:
            scale = torch.where(-low >= high, -low, -high) / form.middle * upper
            zero = torch.full_like(scale, form.middle)
        else:
            scale = (high * upper - low * lower) / form.max_code
            zero = torch.where(scale > 0, -low * lower / scale, 0.0).clamp(0, form.max_code)
            zero = zero if form.free else torch.round(zero).detach()
        scale = torch.where(scale == 0, 1.0, scale)
        plain = [part.detach().numpy().astype(F32) for part in (scale, zero)]
        exact, whole = free_grid(*plain, form) if form.free else (exact_scales(*plain, form), plain[1])
        scale = scale + (torch.from_numpy(exact).double() - scale).detach()
        zero = zero + (torch.from_numpy(whole).double() - zero).detach()
        codes = straight(w / scale[..., None] + offset + zero[..., None]).clamp(0, form.max_code)
        codes = torch.where(w == 0, torch.round(zero[..., None]), codes)
        made = ((codes - zero[..., None]) * scale[..., None]).reshape(len(rows), -1)[:, :k]
        errors = torch.from_numpy(rows.astype(np.float64)) - made
        losses = ((errors @ h) * errors).sum(1)
        for row, loss in enumerate(losses.tolist()):
            if loss < best[row][0]:
                parts = (codes[row].reshape(-1), scale[row], zero[row])
                arrays = [part.detach().numpy().copy()[None] for part in parts]
                kind = F32 if form.free else np.uint8
                best[row] = loss, Blocks(arrays[0].astype(np.uint8), arrays[1].astype(F32), arrays[2].astype(kind))
        found = torch.autograd.grad(losses.sum(), (offset, lower, upper), allow_unused=True)
        rate = (1 - step / iterations) / iterations
        with torch.no_grad():
            for one, gradient, least in ((offset, found[0], -0.5), (lower, found[1], 0.0), (upper, found[2], 0.0)):
                if gradient is not None:
                    one -= rate * gradient.sign() * (real if one is offset else 1)
                    one.clamp_(least, 0.5 if one is offset else 1.0)
    kept = [blocks for _, blocks in best if blocks is not None]
    return Blocks(*(np.concatenate([getattr(b, name) for b in kept]) for name in ("codes", "scales", "zero_points")))


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
        rows.append([-math.log(p[target]), -math.log(q[target]), kl, float(p.argmax() == q.argmax())])
    return np.array(rows)
