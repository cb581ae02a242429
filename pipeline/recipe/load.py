"""YAML -> typed recipe. Every error names file:line:column and what would be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lowbit.passes import methods
from lowbit.passes.base import READING, Options, first_mistake, option_mistake
from lowbit.passes.registry import did_you_mean, find_method, find_pass, names_in
from lowbit.pipeline.errors import RecipeError
from lowbit.pipeline.limits import MAX_TEXT
from lowbit.pipeline.recipe.recipe import PassEntry, Recipe
from lowbit.pipeline.recipe.sections import ONNX_SUFFIX, ORDER, SECTIONS, Convert, Export
from lowbit.pipeline.recipe.settings import trust_by_settings
from lowbit.pipeline.recipe.targets import DEFAULT, find_options, targets_with
from lowbit.pipeline.recipe.yaml_reader import Document, read

RECIPES = Path(__file__).parents[2] / "recipes"
"""Those that come along: `recipes/` beside `pipeline/`, in a checkout as in an installed package."""


def find_recipe(name: str, folder: Path = Path("recipes")) -> Path:
    """The file of a recipe, given by its path, or by its name in `folder` or among those that come along.

    Raises:
        RecipeError: there is none.
    """
    if len(name) > MAX_TEXT:
        raise RecipeError(Path(f"{name[:40]}..."), "no such recipe file.")
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(path, "no such recipe file.")
        return path
    folders = [place for place in (folder, RECIPES) if place.is_dir()]
    for place in folders:
        if (path := place / f"{name}.yaml").is_file():
            return path
    known = sorted({file.stem for place in folders for file in place.glob("*.yaml")})
    raise RecipeError(folders[0] / f"{name}.yaml", f"no such recipe. {did_you_mean(name, known)}")


def load_recipe(file: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: the first thing that is wrong, with its position.
    """
    return check_recipe(read(file))


def check_recipe(document: Document) -> Recipe:
    """A recipe from its values.

    Raises:
        RecipeError: the first thing that is wrong, with its place.
    """
    trust_by_settings()
    file, top = document.file, document.value
    if not isinstance(top, dict):
        raise RecipeError(document.position(()), f"a recipe is a mapping with the sections {', '.join(ORDER)}.")
    for key in top:
        if key not in ORDER:
            raise RecipeError(document.key((key,)), f"unknown section '{key}'. {did_you_mean(key, list(ORDER))}")
    for key in ("model", "passes"):
        if top.get(key) is None:
            raise RecipeError(document.position((key,)), f"the section '{key}' is required.")
    model = top["model"]
    steps = _passes(document, top["passes"])
    sections = {
        name: _options(document, kind, {"source": model} if name == "model" and isinstance(model, str) else top[name], (name,))
        for name, kind in SECTIONS.items()
        if name in top
    }
    recipe = Recipe(
        name=file.stem, file=file, text=document.text, passes=steps, model=sections["model"],  # type: ignore[arg-type]
        export=sections.get("export", Export()), calibrate=sections.get("calibrate"),  # type: ignore[arg-type]
        validate=sections.get("validate"), convert=_hand_offs(document, top),  # type: ignore[arg-type]
    )  # fmt: skip
    _check_scale_dtypes(document, recipe)
    _check_calibration(document, recipe)
    if "export" in top and recipe.model.source.endswith(ONNX_SUFFIX):
        raise RecipeError(
            document.key(("export",)), "the model is an ONNX file, so there is nothing to export. Leave this out."
        )
    return recipe


def _passes(document: Document, items: Any) -> tuple[PassEntry, ...]:
    if not isinstance(items, list) or not items:
        raise RecipeError(document.position(("passes",)), "passes must be a list of pass names, each with its options.")
    return tuple(_step(document, item, ("passes", i)) for i, item in enumerate(items))


def _hand_offs(document: Document, top: dict[str, Any]) -> tuple[Convert, ...]:
    """The section `convert`: one hand-off, or a list of them, each to another target and folder."""
    items = top.get("convert", [])
    entries = [(("convert", i), item) for i, item in enumerate(items)] if isinstance(items, list) else [(("convert",), items)]
    hand_offs: dict[str, Convert] = {}
    for path, item in entries:
        options = _hand_off(document, item, path)
        if options.target in hand_offs:
            raise RecipeError(document.position(path), f"convert names the target {options.target} twice.")
        for other in hand_offs.values():
            if other.folder == options.folder:
                both = " and ".join(sorted((other.target, options.target)))
                raise RecipeError(
                    document.position(("convert",)), f"{both} both make the folder {other.folder}; convert to one of them."
                )
        hand_offs[options.target] = options
    return tuple(hand_offs.values())


def _hand_off(document: Document, item: Any, path: tuple[Any, ...]) -> Convert:
    target = item.get("target", DEFAULT) if isinstance(item, dict) else DEFAULT
    try:
        kind = find_options(target)
    except KeyError as error:
        raise RecipeError(document.position((*path, "target")), error.args[0]) from None
    given = {"target": target, **item} if isinstance(item, dict) else item
    return _options(document, kind, given, path)  # type: ignore[return-value]


def _step(document: Document, item: Any, path: tuple[Any, ...]) -> PassEntry:
    here = document.position(path)
    if isinstance(item, str):
        name, inner = item, path
        options: Any = {}
    elif isinstance(item, dict) and len(item) == 1:
        ((name, options),) = item.items()
        inner = (*path, name)
    else:
        raise RecipeError(here, "an entry of passes is one name, or one name with its options: `- name: {option: value}`.")
    try:
        kind = find_pass(name)
    except KeyError as error:
        raise RecipeError(document.key(inner), error.args[0]) from None
    return PassEntry(name, _options(document, kind, {} if options is None else options, inner), here)  # type: ignore[arg-type]


def _options(document: Document, kind: type[Options], options: Any, path: tuple[Any, ...]) -> Options:
    if not isinstance(options, dict):
        name = next(part for part in reversed(path) if isinstance(part, str))
        raise RecipeError(document.position(path), f"'{name}' takes options: {', '.join(kind.model_fields)}.")
    try:
        return kind.model_validate_json(json.dumps(options))
    except ValidationError as errors:
        error = first_mistake(errors)
        place = (*path, *error["loc"])
        where = document.key(place) if error["type"] == "extra_forbidden" else document.position(place)
        raise RecipeError(where, _sentence(error, kind)) from None


def _sentence(error: ErrorDetails, kind: type[Options]) -> str:
    """What is wrong; an option of another target says whose it is."""
    if error["type"] == "extra_forbidden" and issubclass(kind, Convert) and (owners := targets_with(str(error["loc"][-1]))):
        others = ", ".join(option for option in kind.model_fields if option != "target") or "none"
        name = error["loc"][-1]
        return f"unknown option '{name}'. It is an option of target: {' and '.join(owners)}; this target has {others}."
    return option_mistake(error, kind)


def _check_scale_dtypes(document: Document, recipe: Recipe) -> None:
    """Scales chosen for fp32 would lose digits in an fp16 file: a contradiction that is better found now."""
    if all(getattr(options, "scale_dtype", "fp32") == "fp32" for options in recipe.convert):
        return
    for step in recipe.passes:
        if getattr(step.options, "scale_dtype", "fp16") == "fp32":
            raise RecipeError(
                document.position(("convert",)),
                f"scale_dtype fp16 cannot hold the scales of {step.name} ({step.position.short}), which asks for fp32. "
                "Set scale_dtype: fp32 here, or fp16 there.",
            )


def _check_calibration(document: Document, recipe: Recipe) -> None:
    """What looks at inputs needs text, and text needs something that looks at it."""
    wanted = next((i for i, step in enumerate(recipe.passes) if step.options.phases & READING), None)
    if recipe.calibrate is None and wanted is not None:
        raise RecipeError(
            document.position(("passes", wanted)),
            f"{recipe.passes[wanted].name} looks at the inputs of layers here; say which text makes them, in a section of its "
            "own: calibrate: {text: library}.",
        )
    if recipe.calibrate is not None and wanted is None:
        names = ", ".join(name for name in names_in(methods) if find_method(name).calibrated)
        raise RecipeError(
            document.position(("calibrate",)),
            "no pass looks at inputs, so this text would not be read. Leave the section out, or choose a method that does: "
            f"{names}.",
        )
