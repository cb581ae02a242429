"""Entries of quantized weights -> a sentence on each layer that is too small for the dtype of its scales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.store.store import Entry

DTYPES: dict[str, np.dtype[np.floating]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
REMEDY = {"fp16": "Write scale_dtype: fp32 for it, or do not quantize it", "fp32": "No scale is finer: do not quantize it"}
SMALLEST_NORMAL = 2.0**-126
"""Of float32: what is smaller is a number of fewer digits, and zero wherever an engine counts such numbers as zeros."""
NOTED = 0.01
"""The share of a layer's scales from which on it is said."""


def coarse_scales(entries: Mapping[QuantizedWeight, Entry]) -> list[str]:
    """Layers with scales below `smallest_held`. A block of zeros has the scale 1, so these are blocks of small weights."""
    found = []
    for weight, entry in entries.items():
        held, limit = weight.form.scale_dtype, smallest_held(weight.form)
        share = share_below(np.memmap(entry.file("scales"), DTYPES[held], "r"), limit)
        if share >= NOTED:
            found.append(
                f"{weight.name}: {share:.0%} of its scales are smaller than {held} holds for {weight.form.bits} bits "
                f"({limit:.1e}), so it lost precision; its relative error is {entry.facts['relative_error']:.2f}. "
                f"{REMEDY[held]}."
            )
    return found


def smallest_held(form: BlockFormat) -> float:
    """The smallest scale whose own rounding does not add up to that of a code.

    A scale is off by up to half a step of its dtype, 2^-24 for fp16, and so the largest code by 2^bits times as much: below
    2^bits steps that may be half a scale, as much as rounding to codes may be off.
    """
    return max(form.smallest_scale * (form.max_code + 1), SMALLEST_NORMAL)


def share_below(scales: np.ndarray, limit: float) -> float:
    """The share of scales of a smaller magnitude; floats without sign are in the order of their bits, and bits are quick."""
    bits = np.dtype(f"u{scales.itemsize}")
    magnitudes = scales.view(bits) & bits.type(np.iinfo(bits).max >> 1)
    return float(np.mean(magnitudes < np.array(limit, scales.dtype).view(bits)))
