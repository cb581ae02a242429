"""A model and a number of bits -> the recipe that is best for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lowbit.pipeline.checkpoint.resolve import open_model
from lowbit.pipeline.commands.defaults import Wanted, choose
from lowbit.pipeline.commands.recipes import Recipe, hand_offs_of, name_of, source_of
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.build import Entry, HandOff, Section
from lowbit.pipeline.recipe.settings import trust_by_settings


def recipe_for(
    model: str | Path,
    passes: Sequence[Entry] | None = None,
    *,
    bits: int | None = None,
    block_size: int = 64,
    method: str = "mse",
    fit: str | None = None,
    convert: HandOff | Sequence[HandOff] | None = None,
    calibrate: Section | None = None,
    validate: Section | bool = True,
    export: Section | None = None,
    name: str | None = None,
) -> Recipe:
    """The recipe for a model in which everything that is not said is chosen for that model; `said` tells what and why.

    A model on the Hub is fetched for it, since the choice depends on its weights, and pinned to the commit that was fetched.

    Args:
        passes: in place of bits, block_size, method and fit; what the model needs besides is put before them.
        bits: 2, 3, 4 or 8, by default 4.
        fit: the largest size of the first hand-off instead, `3.2GB`: bits are chosen for each weight.
        convert: targets, or their options; by default the one that takes such models.
        validate: True chooses how much text; False leaves it out.

    Raises:
        PipelineError: the model cannot be found or read, or options contradict each other.
    """
    trust_by_settings()
    if fit is not None and bits is not None:
        raise PipelineError(f"bits {bits} and fit {fit} contradict each other: fit chooses the bits. Give one of them.")
    if passes is not None and (fit is not None or bits is not None):
        raise PipelineError("passes say all about bits; give either passes, or bits or fit.")
    hand_offs = None if convert is None else hand_offs_of(convert)
    targets = tuple(str(one["target"] if isinstance(one, Mapping) else one.target) for one in hand_offs or ())
    source = source_of(model)
    checkpoint = open_model(source)
    pinned = source if checkpoint.revision is None else {"source": source, "revision": checkpoint.revision}
    chosen = choose(checkpoint, Wanted(bits, block_size, method, targets, fit), passes)
    sections = chosen.sections
    hand_offs = hand_offs and [{"compare": "quick", **one} if isinstance(one, Mapping) else one for one in hand_offs]
    given = {"export": export, "calibrate": calibrate, "convert": hand_offs}
    sections |= {key: value for key, value in given.items() if value is not None}
    if not isinstance(validate, bool):
        sections["validate"] = validate
    elif not validate:
        del sections["validate"]
    ending = "" if passes is not None else f"-fit-{fit.replace(' ', '').lower()}" if fit else f"-q{bits or 4}"
    recipe = Recipe(pinned, name=name or f"{name_of(model)}{ending}", **sections)
    recipe.said = tuple(chosen.said)
    return recipe
