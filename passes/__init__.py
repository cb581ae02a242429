"""Graph-to-graph rewrites. Every module here but `base` and `registry` is one pass, and its class is offered here, too."""

from __future__ import annotations

import sys
from typing import Any


def __getattr__(name: str) -> Any:
    """The class of a pass, imported when it is asked for: `from lowbit.passes import QuantizeMatmul`."""
    from lowbit.passes.registry import class_called

    return class_called(name, sys.modules[__name__])


def __dir__() -> list[str]:
    from lowbit.passes.registry import class_name, names_in

    return [*globals(), *map(class_name, names_in(sys.modules[__name__]))]
