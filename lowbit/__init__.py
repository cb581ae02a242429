"""From a Hugging Face checkpoint to a 4-, 3- or 2-bit model that runs, and that is proven to be the model you asked for.

What is here is imported when it is first used: `import lowbit` itself loads no library.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from lowbit.passes.base import PassError
    from lowbit.pipeline.api import (
        Chat,
        Comparison,
        Plan,
        Recipe,
        Result,
        chat,
        check,
        compare,
        doctor,
        frontier,
        load_recipe,
        measure,
        plan,
        quantize,
        recipe_for,
        run,
        schema,
        sweep,
        trust_plugins,
    )
    from lowbit.pipeline.errors import PipelineError, RecipeError, ValidationFailed

__all__ = [
    "Chat", "Comparison", "PassError", "PipelineError", "Plan", "Recipe", "RecipeError", "Result", "ValidationFailed",
    "chat", "check", "compare", "doctor", "frontier", "load_recipe", "measure", "plan", "quantize", "recipe_for", "run",
    "schema", "sweep", "trust_plugins",
]  # fmt: skip

ERRORS = {"PassError": "passes.base", "PipelineError": "pipeline.errors", "RecipeError": "pipeline.errors"}
ERRORS |= {"ValidationFailed": "pipeline.errors"}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lowbit")
    if name not in __all__:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lowbit.{ERRORS.get(name, 'pipeline.api')}"), name)


def __dir__() -> list[str]:
    """Say what there is without importing it."""
    return [*__all__, "__version__"]
