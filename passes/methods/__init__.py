"""How codes are chosen. Every module here is one method, and its class is offered here, too."""

from __future__ import annotations

import sys
from typing import Any


def __getattr__(name: str) -> Any:
    """The class of a method, imported when it is asked for: `from lowbit.passes.methods import Mse`."""
    from lowbit.passes.registry import class_called

    return class_called(name, sys.modules[__name__])


def __dir__() -> list[str]:
    from lowbit.passes.registry import class_name, names_in

    return [*globals(), *map(class_name, names_in(sys.modules[__name__]))]
