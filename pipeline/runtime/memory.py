"""A checkpoint -> the memory that its weights need in float, and whether there is so much; and giving memory back."""

from __future__ import annotations

import ctypes

import numpy as np
import psutil

from lowbit.pipeline.checkpoint.huggingface import Checkpoint


def return_memory() -> None:
    """Let the allocator give freed memory back to the system, where it is glibc's."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def too_large(checkpoint: Checkpoint, copies: int = 1) -> str | None:
    """Why nobody can hold the model's weights in float here, so many times over, or None."""
    need, free = copies * memory_needed(checkpoint), psutil.virtual_memory().available
    if need < free:
        return None
    return f"the weights in float need {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def memory_needed(checkpoint: Checkpoint) -> int:
    """Bytes of all weights in float32, and half as much again while they are made."""
    return 6 * sum(int(np.prod(w.shape)) for w in checkpoint.weights.values())
