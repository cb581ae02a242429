"""Slow, obvious versions of the calibrated methods: float64, one weight after the other."""

from __future__ import annotations

import math

import numpy as np

from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian
from tests.reference import F32, blocks_of, exact_scale, exact_scales, free_grid, in_scale_dtype, rtn, weighted


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
