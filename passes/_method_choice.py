"""`method:` in a recipe: a name, or a name with options, both a file of passes/methods/."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, SerializeAsAny, ValidationError

from passes.methods.base import Method


def _parse(value: Any) -> Any:
    from passes._registry import find_method  # the registry imports every pass's base, so not at the top

    if isinstance(value, Method):
        return value
    name: Any = value
    options: Any = {}
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
    if not isinstance(name, str):
        raise ValueError("a method is a name such as rtn, or one name with its options: {hqq: {iterations: 30}}")
    try:
        method = find_method(name)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    try:
        return method.model_validate_json(json.dumps(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        fields = ", ".join(method.model_fields) or "none"
        raise ValueError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}. Options: {fields}.") from None


def _name(method: Method) -> Any:
    module = type(method).__module__
    name = module.rpartition(".")[2] if module.startswith("passes.methods.") else module
    options = method.model_dump(exclude_defaults=True)
    return {name: options} if options else name


MethodChoice = Annotated[SerializeAsAny[Method], BeforeValidator(_parse), PlainSerializer(_name)]
