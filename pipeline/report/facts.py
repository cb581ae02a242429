"""What every model of manifest.json is: frozen, exact in its types, closed to names that it does not know."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Facts(BaseModel):
    """Facts that do not change once they are known."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


def optional() -> Any:
    """A field that may be None, and is left out of JSON then."""
    return Field(default=None, exclude_if=lambda value: value is None)
