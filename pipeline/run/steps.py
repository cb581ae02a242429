"""The list of steps that a recipe is: what a run executes, and what a plan prints."""

from __future__ import annotations

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.run.convert import converting_steps
from lowbit.pipeline.run.prepare import opening_steps, rehearsal
from lowbit.pipeline.run.quantize import quantizing_steps
from lowbit.pipeline.run.step import Step
from lowbit.pipeline.run.validate import validating_steps


def steps_after_opening(recipe: Recipe, checkpoint: Checkpoint) -> list[Step]:
    """The steps of a recipe whose bits are chosen, from the rehearsal to the last comparison."""
    return [
        rehearsal(),
        *quantizing_steps(recipe),
        *validating_steps(recipe, checkpoint),
        *converting_steps(recipe, checkpoint),
    ]


def all_steps(asked: Recipe, resolved: Recipe, checkpoint: Checkpoint) -> list[Step]:
    """Every step of a run.

    Args:
        asked: the recipe as it was written.
        resolved: the same with bits instead of a budget, if it had one.
    """
    return [*opening_steps(asked, checkpoint), *steps_after_opening(resolved, checkpoint)]
