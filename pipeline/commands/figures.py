"""Figures of what is no result yet, as plain values: what `--json` prints."""

from __future__ import annotations

from typing import Any

from lowbit.pipeline.estimate.sizes import Plan


def plan_figures(plan: Plan) -> dict[str, Any]:
    """Sizes in bytes, time in seconds, and what every weight becomes."""
    totals = ("bits_per_weight", "source_bytes", "float_bytes", "onnx_bytes", "hand_off_bytes", "disk_bytes", "memory_bytes")
    return {
        "recipe": plan.recipe.name,
        **{name: getattr(plan, name) for name in totals},
        "seconds": plan.seconds,
        "steps": list(plan.steps),
        "weights": {
            one.weight.name: {
                "shape": list(one.weight.source.shape), "bits": one.weight.form.bits, "block_size": one.weight.form.block_size,
                "method": one.weight.made_by, "onnx_bytes": one.onnx_bytes, "known": one.cached,
            }
            for one in plan.weights
        },
    }  # fmt: skip
