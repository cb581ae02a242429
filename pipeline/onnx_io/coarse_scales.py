"""Entries of quantized weights -> a sentence on each layer that is too small for the dtype of its scales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.store.store import Entry

DTYPES: dict[str, np.dtype[np.floating]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
REMEDY = {"fp16": "Write scale_dtype: fp32 for it, or exclude it", "fp32": "No scale is finer: exclude it"}
NOTED = 0.01
"""The share of a layer's scales from which on it is said."""


def coarse_scales(entries: Mapping[QuantizedWeight, Entry]) -> list[str]:
    """Layers of which scales lie below the smallest normal number of their dtype, where precision fades bit by bit to nothing.

    A block of zeros has the scale 1, so these are blocks of small weights, and some of what they say is lost. fp16 holds scales
    in full from 2^-14 on (6.1e-5), float32 from 2^-126 on (IEEE 754, 3.4).
    """
    found = []
    for weight, entry in entries.items():
        held = weight.form.scale_dtype
        limit = float(np.finfo(DTYPES[held]).smallest_normal)
        scales = np.memmap(entry.file("scales"), DTYPES[held], "r")
        share = float(np.mean(np.abs(scales) < limit))
        if share >= NOTED:
            found.append(
                f"{weight.name}: {share:.0%} of its scales are smaller than {held} holds in full ({limit:.1e}); its relative "
                f"error is {entry.facts['relative_error']:.2f}. {REMEDY[held]}."
            )
    return found
