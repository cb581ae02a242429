"""Models in a store: kept as the facts of an entry, recalled as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from lowbit.pipeline.store.store import Store

T = TypeVar("T")


def recall_model(store: Store, key: str, kind: TypeAdapter[T], compute: Callable[[], T]) -> tuple[T, bool]:
    """The model of `key`: recalled, or computed and kept; and whether it was recalled.

    Facts that are no such model were kept by another version of this code; they are computed anew.
    """
    if (entry := store.get(key)) is not None:
        try:
            return kind.validate_json(to_json(entry.facts, inf_nan_mode="constants")), True
        except ValidationError:
            store.remove(entry)
    model = compute()
    store.put(key, lambda _: kind.dump_python(model, mode="json"))
    return model, False
