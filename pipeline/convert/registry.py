"""Targets by their names in recipes and manifests."""

from __future__ import annotations

from typing import Any

from lowbit.passes.registry import class_in
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.base import Target
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.recipe.sections import Convert
from lowbit.pipeline.recipe.targets import find_options


def find_target(name: str) -> type[Target[Any]]:
    """The target of a word, or of a plug-in module given by its dotted name.

    Raises:
        ConvertError: there is none; what is there.
    """
    try:
        options = find_options(name)
        return class_in(options.made_by or options.__module__, Target, "target")  # type: ignore[type-abstract]
    except KeyError as error:
        raise ConvertError(error.args[0]) from None


def make_target(options: Convert, checkpoint: Checkpoint) -> Target[Any]:
    """The target that `options` are of, about to take a model of `checkpoint`."""
    return find_target(options.target)(options, checkpoint)
