"""YAML -> typed recipe. Every error names file:line:column and what would be right."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import onnx_graphsurgeon as gs
from pydantic import Field, ValidationError, model_validator

from passes import methods
from passes._blocks import ScaleDtype
from passes._registry import did_you_mean, find_method, find_pass, names_in
from passes.base import Options, Outcome, Pass, PassError
from pipeline.errors import Position, RecipeError
from pipeline.export import Export
from pipeline.yaml_file import Document, read


class Model(Options):
    """The checkpoint to start from."""

    source: Annotated[str, Field(min_length=1)]
    """A folder or an ONNX file (relative to the recipe; begins with `.`, `/` or `~`), or a model id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit on the Hub: pin it, or the model may change under the recipe."""

    @property
    def is_folder(self) -> bool:
        return self.source.startswith((".", "/", "~"))


class Calibrate(Options):
    """The text that calibrated methods look at layers' inputs on; never the one that `validate` measures on."""

    text: Annotated[str, Field(min_length=1)] = "library"
    """`library`: docstrings of Python's standard library; `generated`: what the float model itself writes, the best choice
    for models that reason; or a UTF-8 file, relative to the recipe."""
    prompts: Annotated[str, Field(min_length=1)] | None = None
    """For `generated`: a UTF-8 file of prompts with lines of `---` between them, relative to the recipe; by default 64 of
    our own. After an empty prompt the model writes whatever it likes."""
    windows: Annotated[int, Field(ge=1)] = 128
    """How many windows of tokens."""
    window: Annotated[int, Field(ge=16, le=32768)] = 256
    """Tokens of a window, read from scratch."""
    seed: Annotated[int, Field(ge=0)] = 0
    """For the choice of text, and for sampling what is generated."""
    asymmetric: bool = True
    """Let each layer also make up for the errors of the layers before it (GPTAQ, arXiv:2504.02692), not for its own alone."""


class Validate(Options):
    """How far the result is from the float model, on text."""

    text: str | None = None
    """A UTF-8 text file, relative to the recipe; by default the topics of Python's own help."""
    window: Annotated[int, Field(ge=2, le=32768)] = 512
    """Tokens that are read at once, each window from scratch."""
    windows: Annotated[int, Field(ge=1)] = 60
    """How many windows, from the start of the text."""
    inputs: str | None = None
    """For models that read no text: an .npz file of one array for each input, relative to the recipe; by default noise, where
    the shapes are known."""
    max_kl_divergence: Annotated[float, Field(gt=0)] | None = None
    """Gate: mean KL divergence from the float model, nats per token."""
    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    """Gate: perplexity over that of the float model."""
    max_relative_error: Annotated[float, Field(gt=0)] | None = None
    """Gate, for models that are no decoders: the largest relative error of an output."""


class Convert(Options):
    """Hand-off to another engine: the same codes and scales, bit for bit. A list of these makes a folder for each."""

    target: Literal["mnn-llm", "mnn", "onnxruntime-genai"] = "mnn-llm"
    """`mnn-llm`: the folder `mnn`, which MNN's LLM runtime opens; `mnn`: the folder `mnn` with model.mnn, which has the inputs
    and outputs of the ONNX file, for models that are no decoders; `onnxruntime-genai`: the folder `genai`, with attention and
    norms in onnxruntime's own operators."""
    scale_dtype: ScaleDtype = "fp16"
    """Dtype of scales and offsets in an MNN file. fp16 is exact for weights quantized with scale_dtype: fp16."""
    three_bit: Literal["packed", "folded"] = "packed"
    """For onnxruntime-genai. `packed`: three bits on the disk, unpacked whenever the model is loaded; `folded`: unpacked to
    nibbles now, four bits on the disk, loaded as fast as four bits."""

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        mnn = self.target.startswith("mnn")
        if self.three_bit == "folded" and mnn:
            raise ValueError(f"three_bit: folded is for target: onnxruntime-genai; {self.target} stores three bits as three")
        if self.scale_dtype == "fp32" and not mnn:
            raise ValueError(f"scale_dtype is of MNN's file; {self.target} stores scales as quantize_matmul made them")
        return self


SECTIONS: dict[str, type[Options]] = {
    "model": Model, "export": Export, "calibrate": Calibrate, "validate": Validate, "convert": Convert,
}  # fmt: skip
ONNX_SUFFIX = ".onnx"
ORDER = ("model", "export", "calibrate", "passes", "validate", "convert")


@dataclass(frozen=True)
class Step:
    """One entry under `passes:`."""

    name: str
    options: Pass
    position: Position

    def apply(self, graph: gs.Graph) -> Outcome:
        """Apply the pass; rewriting nothing is an error unless the pass says otherwise.

        Raises:
            PassError: with a note that names this entry.
        """
        try:
            outcome = self.options.apply(graph)
            if not outcome.rewritten and not self.options.may_rewrite_nothing:
                raise PassError("rewrote nothing.")
        except PassError as error:
            error.add_note(f"in {self.name}, {self.position}")
            raise
        return outcome


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked. `calibrate` and `validate` are None, `convert` is empty when the recipe leaves them out."""

    name: str
    file: Path
    text: str
    model: Model
    export: Export
    calibrate: Calibrate | None
    passes: tuple[Step, ...]
    validate: Validate | None
    convert: tuple[Convert, ...]

    @property
    def folder(self) -> Path:
        return self.file.resolve().parent


def find_recipe(name: str, folder: Path = Path("recipes")) -> Path:
    """The file of a recipe, given by its path or by its name in `folder`."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(path, "no such recipe file.")
        return path
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise RecipeError(path, f"no such recipe. {did_you_mean(name, known)}")
    return path


def load_recipe(file: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: the first thing that is wrong, with its position.
    """
    document = read(file)
    top = document.value
    if not isinstance(top, dict):
        raise RecipeError(Position(file, 1, 1), f"a recipe is a mapping with the sections {', '.join(ORDER)}.")
    for key in top:
        if key not in ORDER:
            raise RecipeError(document.keys[(key,)], f"unknown section '{key}'. {did_you_mean(key, list(ORDER))}")
    for key in ("model", "passes"):
        if top.get(key) is None:
            raise RecipeError(document.position((key,)), f"the section '{key}' is required.")
    model = top["model"]
    steps = _passes(document, top["passes"])
    sections = {
        name: _options(document, kind, {"source": model} if name == "model" and isinstance(model, str) else top[name], (name,))
        for name, kind in SECTIONS.items()
        if name in top and name != "convert"
    }
    recipe = Recipe(
        name=file.stem, file=file, text=file.read_text("utf-8"), passes=steps, model=sections["model"],  # type: ignore[arg-type]
        export=sections.get("export", Export()), calibrate=sections.get("calibrate"),  # type: ignore[arg-type]
        validate=sections.get("validate"), convert=_hand_offs(document, top),  # type: ignore[arg-type]
    )  # fmt: skip
    _check_scale_dtypes(document, recipe)
    _check_calibration(document, recipe)
    if "export" in top and recipe.model.source.endswith(ONNX_SUFFIX):
        raise RecipeError(
            document.keys[("export",)], "the model is an ONNX file, so there is nothing to export. Leave this out."
        )
    return recipe


def _passes(document: Document, items: Any) -> tuple[Step, ...]:
    if not isinstance(items, list) or not items:
        raise RecipeError(document.position(("passes",)), "passes must be a list of pass names, each with its options.")
    return tuple(_step(document, item, ("passes", i)) for i, item in enumerate(items))


def _hand_offs(document: Document, top: dict[str, Any]) -> tuple[Convert, ...]:
    """The section `convert`: one hand-off, or a list of them, each to another target."""
    if "convert" not in top:
        return ()
    if not isinstance(items := top["convert"], list):
        return (_options(document, Convert, items, ("convert",)),)  # type: ignore[return-value]
    found: dict[str, Convert] = {}
    for i, item in enumerate(items):
        one = _options(document, Convert, item, ("convert", i))
        assert isinstance(one, Convert)
        if one.target in found:
            raise RecipeError(document.position(("convert", i)), f"convert names the target {one.target} twice.")
        found[one.target] = one
    if {"mnn", "mnn-llm"} <= set(found):
        raise RecipeError(document.position(("convert",)), "mnn and mnn-llm both make the folder mnn; convert to one of them.")
    return tuple(found.values())


def _step(document: Document, item: Any, path: tuple[Any, ...]) -> Step:
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
        raise RecipeError(document.keys.get(inner, here), error.args[0]) from None
    return Step(name, _options(document, kind, {} if options is None else options, inner), here)  # type: ignore[arg-type]


def _options(document: Document, kind: type[Options], options: Any, path: tuple[Any, ...]) -> Options:
    if not isinstance(options, dict):
        name = next(part for part in reversed(path) if isinstance(part, str))
        raise RecipeError(document.position(path), f"'{name}' takes options: {', '.join(kind.model_fields)}.")
    try:
        return kind.model_validate_json(json.dumps(options))
    except ValidationError as errors:
        error = errors.errors()[0]
        place = (*path, *error["loc"])
        if error["type"] == "extra_forbidden":
            where = document.keys.get(place, document.position(place))
        else:
            where = document.position(place)
        raise RecipeError(where, _sentence(error, kind)) from None


def _sentence(error: Any, kind: type[Options]) -> str:
    """What pydantic found, said for somebody who looks at YAML."""
    name = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"unknown option '{name}'. {_field_like(name, kind)}"
        case "missing":
            return f"the option '{name}' is required."
        case "literal_error":
            return f"{name} is {error['input']!r}; expected {error['ctx']['expected']}."
        case "value_error":
            return f"{name}: {error['ctx']['error']}" if name else f"{error['ctx']['error']}."
    message = error["msg"].replace("Input should be", "expected").replace("a valid array", "a list")
    return f"{name} is {error['input']!r}; {message[0].lower()}{message[1:]}."


def _field_like(name: str, kind: type[Options]) -> str:
    known = sorted(kind.model_fields, key=lambda field: field not in kind.__annotations__)  # its own first, then shared ones
    near = difflib.get_close_matches(name.rpartition(".")[2].lower(), known, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Options: {', '.join(known) or 'none'}."


def _check_scale_dtypes(document: Document, recipe: Recipe) -> None:
    """Scales chosen for fp32 would lose digits in an fp16 file: a contradiction that is better found now."""
    if all(not one.target.startswith("mnn") or one.scale_dtype == "fp32" for one in recipe.convert):
        return
    for step in recipe.passes:
        if getattr(step.options, "scale_dtype", "fp16") == "fp32":
            raise RecipeError(
                document.position(("convert",)),
                f"scale_dtype fp16 cannot hold the scales of {step.name} (line {step.position.line}), which asks for fp32. "
                "Set scale_dtype: fp32 here, or fp16 there.",
            )


def _check_calibration(document: Document, recipe: Recipe) -> None:
    """What looks at inputs needs text, and text needs something that looks at it."""
    wanted = next((i for i, step in enumerate(recipe.passes) if step.options.calibrated), None)
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
