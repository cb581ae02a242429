"""Parts of a manifest: the checkpoint, steps, weights, sizes, hand-offs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field, JsonValue

from lowbit.pipeline.report.facts import Facts


class Source(Facts):
    """The checkpoint."""

    source: str
    """As the recipe names it."""
    revision: str | None
    """The commit on the Hub; None for a folder or a file."""
    digest: str
    """SHA-256 over the configuration and every tensor."""
    shards: dict[str, dict[str, str]]
    """SHA-256 of every tensor, by file and name."""


class StepRecord(Facts):
    """One step of a run, as the manifest has it."""

    name: str
    options: dict[str, JsonValue]
    key: str = ""
    """SHA-256 of everything that the step depends on; empty for one that makes nothing."""
    cached: bool = False
    """Whether all that it makes was known."""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    """Most memory that was in use at a time, by this process or one that it started."""
    rewritten: list[str] = Field(default_factory=list)
    """What a pass rewrote, by name."""
    skipped: dict[str, str] = Field(default_factory=dict)
    """What a pass left alone, with a sentence each."""
    notes: list[str] = Field(default_factory=list)
    """Remarks for people."""


class WeightRecord(Facts):
    """One quantized weight."""

    shape: tuple[int, int]
    """Out and in features."""
    bits: int
    block_size: int
    symmetric: bool
    zero_point: Literal["integer", "float"]
    method: str
    """What chose the codes, and what trained them."""
    mse: float
    """Mean squared error of the weight's elements."""
    relative_error: float
    """|W' - W| / |W| in the Euclidean norm."""
    bits_per_weight: float
    """Scales and zero points counted."""
    source_sha256: str
    """Of the tensor that it was made from."""
    codes_sha256: str


class Size(Facts):
    """Sizes of a result's folders, each as `<folder>_bytes`: `size.onnx_bytes`, `size.mnn_bytes`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int] = Field(init=False)

    bits_per_weight: float
    """Stored bits over all quantized weights, scales and zero points counted."""
    onnx_bytes: int

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...

    def of(self, folder: str) -> int:
        """Bytes of all files in a folder of the result."""
        return int(getattr(self, f"{folder}_bytes"))


class HandOff(Facts):
    """One engine's folder."""

    target: str
    """The engine, as recipes name it."""
    options: dict[str, JsonValue]
    """The target's own options."""
    label: str
    """The engine, as tables name it."""
    modes: dict[str, str]
    """What the engine's ways to compute are called in tables, by their names in `quality`; the first is in float arithmetic."""
    usage: str
    """Python that opens the folder, for the model card; empty where the engine is used in other ways."""
    bit_exact: Literal[True]
    """All codes and scales were compared and are equal: there is no result otherwise."""
    weights_checked: int
    """How many codes were compared."""
    lowering_relative_error: float | None
    """Of the lowered graph's logits; None where onnxruntime cannot run the lowered graph."""
    max_relative_error: float | None
    """Of the engine in float arithmetic, beside onnxruntime; None where it was not run."""
