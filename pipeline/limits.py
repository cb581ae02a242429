"""How much a stranger's file may take: numbers that nobody's model needs more of, and how a process is held to them."""

from __future__ import annotations

import contextlib

import psutil

MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_TEXT = 1 << 20, 10_000, 20, 4096
"""Of a recipe: bytes, values, levels, and characters of one value; the longest is a path."""
MAX_INTEGER = (1 << 63) - 1
"""The largest number in a recipe."""

TEXT_BYTES, DEEPEST = 64 << 20, 64
"""Of a configuration, tokenizer or template, and of JSON: bytes, and levels. Gemma's tokenizer.json takes 33 MB."""

MAX_HEADER_BYTES = 25_000_000
"""Of a safetensors header: the format's own cap (https://github.com/huggingface/safetensors#format)."""

MOST_WIDTH, MOST_INNER, MOST_LAYERS, MOST_HEADS = 1 << 17, 1 << 20, 1 << 12, 1 << 12
MOST_EXPERTS, MOST_TOKENS, MOST_POSITIONS = 1 << 12, 1 << 24, 1 << 26
MOST_LABELS, MOST_PIXELS, MOST_CHANNELS, MOST_PATCHES = 1 << 17, 1 << 14, 1 << 8, 1 << 16
"""Of a configuration: more than the published models have."""

TOKENIZER_SECONDS, TOKENIZER_BYTES = 5, 1 << 30
"""Of processor time to load a tokenizer and read a page, and of memory."""

MOST_NODES, MOST_BODIES, MOST_ELEMENTS, MOST_RANK = 200_000, 8, 1 << 40, 64
MOST_CONSTANT_ELEMENTS, MOST_ROUNDS = 1 << 26, 1 << 16
"""Of an ONNX graph: nodes, bodies in one another, elements and dimensions of a tensor, elements that constants are expanded to,
rounds of a Loop."""
MOST_ONNX_BYTES = (1 << 31) - 1
"""What protobuf reads at most; of more it would say so after it had all of it in memory."""

INPUT_BYTES = 1 << 30
"""Of a file of inputs, unpacked."""

OUT_OF_MEMORY = 3
"""The status of a process that noticed itself that its memory is at an end."""

TEMPLATE_SECONDS, TEMPLATE_BYTES, TEMPLATE_CHARACTERS = 3, 256 << 20, 16 << 20
"""Of processor time for one conversation, of memory beyond what the imports took, and of the text that comes out."""


def export_limits(weights: int, values: int, cores: int) -> tuple[int, int]:
    """Seconds of processor time and bytes of memory for an export.

    Args:
        weights: how many tensors the checkpoint has: a graph grows with them.
        values: bytes of those that are traced with their values.
        cores: each has a thread with memory of its own.
    """
    return 120 + weights, (8 << 30) + (weights << 20) + 4 * values + (cores << 27)


def onnx_limits(disk: int, cores: int) -> tuple[int, int]:
    """Seconds of processor time and bytes of memory to read a stranger's ONNX file.

    Args:
        disk: bytes that it and the files beside it take.
        cores: each has a thread with memory of its own.
    """
    return 120 + (disk >> 24), (4 << 30) + 4 * disk + (cores << 27)


def limit_seconds(seconds: int) -> None:
    """End this process when it takes so many more seconds of processor time; a later call starts the count anew."""
    import resource  # no module of every system

    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)


def limit_memory(size: int) -> None:
    """Let this process take `size` more bytes of memory than it has now; beyond that its allocations fail."""
    import resource  # no module of every system

    _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + size)


def _limit(what: int, most: int) -> None:
    import resource

    _, hard = resource.getrlimit(what)
    with contextlib.suppress(ValueError):  # macOS takes no limit of memory; that of time ends what runs away
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
