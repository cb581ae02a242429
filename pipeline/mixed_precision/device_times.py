"""A device's name -> how long a product takes there at each width: a table that comes along or that `lowbit measure` made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from lowbit.passes.base import Options
from lowbit.passes.registry import did_you_mean
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.recipe.load import RECIPES
from lowbit.pipeline.recipe.yaml_reader import read_table


class DeviceTimes(Options):
    """One product of a weight with a vector, as decoding does it for every weight."""

    device: str
    """What it was measured on."""
    engine: str
    """By which engine, and its version."""
    source: str
    """By whom, and where to read more."""
    shape: tuple[int, int]
    """N and K of the weight."""
    block_size: int
    """Weights per scale."""
    microseconds: Annotated[dict[int, float], Field(min_length=1)]
    """By bits; 4 must be there."""

    def relative(self, bits: tuple[int, ...]) -> dict[int, float]:
        """Time at each width, 4 bits being 1.

        Raises:
            PipelineError: one was not measured.
        """
        if missing := [width for width in (*bits, 4) if width not in self.microseconds]:
            known = ", ".join(map(str, sorted(self.microseconds)))
            raise PipelineError(
                f"{self.device}: nobody measured {missing[0]} bits there, only {known}. Leave {missing[0]} out of bits, or "
                "measure them with `lowbit measure`."
            )
        return {width: self.microseconds[width] / self.microseconds[4] for width in bits}


def device_times(name: str, folder: Path) -> DeviceTimes:
    """The table called `name`: a file of `folder`/targets or of those that come along, or a path relative to `folder`.

    Raises:
        PipelineError: there is none, or it is no such table.
    """
    own, along = folder / "targets", RECIPES / "targets"
    path = folder / name if name.endswith((".yaml", ".yml")) else own / f"{name}.yaml"
    if not path.is_file() and (shipped := along / f"{name}.yaml").is_file():
        path = shipped
    if not path.is_file():
        known = list(dict.fromkeys(file.stem for place in (own, along) for file in sorted(place.glob("*.yaml"))))
        raise PipelineError(f"{path}: no such table of times. {did_you_mean(name, known)} `lowbit measure` makes one.")
    try:
        return DeviceTimes.model_validate(read_table(path), strict=False)
    except (ValidationError, RecipeError) as error:
        raise PipelineError(f"{path}: no table of times: {error}") from error
