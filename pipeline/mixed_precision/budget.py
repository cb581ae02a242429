"""A recipe -> its budget: the entry `allocate_bits`, and the entries that come in its place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from lowbit.passes.allocate_bits import AllocateBits
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.recipe import PassEntry, Recipe

SHARED_OPTIONS = ("symmetric", "zero_point", "method", "scale_dtype", "accuracy_level")
"""What every entry takes over from the one that it was chosen by."""
Forms = dict[str, BlockFormat]
"""What each layer gets, by name."""


@dataclass(frozen=True)
class BudgetEntry:
    """The entry of a recipe that is `allocate_bits`: its number under `passes:`, the entry, and its options."""

    position: int
    entry: PassEntry
    options: AllocateBits

    def build_entries(self, forms: Forms) -> list[PassEntry]:
        """The `quantize_matmul` entries that give every layer its form."""
        names: dict[BlockFormat, list[str]] = defaultdict(list)
        for name, form in forms.items():
            names[form].append(name)
        shared = {option: getattr(self.options, option) for option in SHARED_OPTIONS}
        return [
            PassEntry(
                "quantize_matmul",
                QuantizeMatmul(bits=form.bits, block_size=form.block_size, include=tuple(names[form]), **shared),  # type: ignore[arg-type]
                self.entry.position,
            )
            for form in sorted(names, key=lambda form: (form.bits, form.block_size))
        ]


def budget_entry(recipe: Recipe) -> BudgetEntry | None:
    """The entry of a recipe that is `allocate_bits`, if there is one.

    Raises:
        PipelineError: there are several.
    """
    entries = [
        BudgetEntry(position, entry, entry.options)
        for position, entry in enumerate(recipe.passes)
        if isinstance(entry.options, AllocateBits)
    ]
    if len(entries) > 1:
        raise PipelineError(f"{recipe.file}: allocate_bits is there {len(entries)} times; one budget goes for all weights.")
    return entries[0] if entries else None


def check_budget(asked: Recipe, work: Path) -> None:
    """Check that the folder that `fit` speaks of, in `work`, is within it: a budget is kept, or the result is not published."""
    if (entry := budget_entry(asked)) is None or (fit := entry.options.fit_bytes) is None:
        return
    folder = work / (asked.convert[0].folder if asked.convert else "onnx")
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > fit:
        raise RuntimeError(f"{folder.name} has {size} bytes, fit: {entry.options.fit} allows {fit}")


def describe_budget(options: AllocateBits) -> str:
    """The budget as the recipe says it."""
    return f"fit: {options.fit}" if options.fit else f"bits_per_weight: {options.bits_per_weight:g}"
