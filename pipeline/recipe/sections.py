"""The sections of a recipe and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lowbit.passes.base import Options
from lowbit.pipeline.errors import CheckpointError

Task = Literal["text-generation-with-past", "feature-extraction", "image-classification", "text-classification"]

ONNX_SUFFIX = ".onnx"
ORDER = ("model", "export", "calibrate", "passes", "validate", "convert")


class Export(Options):
    """How the checkpoint becomes ONNX."""

    task: Task = "text-generation-with-past"
    """optimum's name of what the model does: decoders generate text, encoders extract features or classify."""
    opset: Literal[18, 20, 21] = 18
    """ONNX operator set of the graph."""


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
    plain_rtn: bool = True
    """Whether codes by plain rounding are measured beside those of another method: what the method brings. For text."""
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
    """Hand-off to another engine: the same codes and scales, bit for bit. A list of these makes a folder for each.

    Every target has options of its own: subclasses, found by `recipe/targets.py`.
    """

    folder: ClassVar[str]
    """What the engine's folder is called within a result."""
    made_by: ClassVar[str] = ""
    """The module of the target that these are the options of; by default the one that defines them."""
    half_embedding: ClassVar[bool] = False
    """Whether the engine holds a float embedding in half precision only."""
    free_offsets: ClassVar[bool] = False
    """Whether blocks may begin anywhere (`zero_point: float`) at no cost."""

    target: str
    """The engine: a word of a room of pipeline/convert, or the dotted name of a module of your own."""
    compare: Literal["full", "quick", "none"] = "full"
    """How much the engine is run on beside onnxruntime: four windows of the text of `validate` and 32 tokens of its own;
    one window and 8 tokens; nothing. Codes and scales are proven equal either way."""


SECTIONS: dict[str, type[Options]] = {
    "model": Model, "export": Export, "calibrate": Calibrate, "validate": Validate,
}  # fmt: skip
"""All but `passes` and `convert`, whose options depend on what they name."""


def place_of(folder: Path, source: str) -> Path:
    """The whole path of a model that is here: `~` is a home, what is relative starts from `folder`.

    Raises:
        CheckpointError: there can be no such path.
    """
    try:
        place = (folder / Path(source).expanduser()).resolve()
        place.exists()  # raises where a name is longer than any
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: nobody is called so, or links in a circle
        raise CheckpointError(f"{source}: cannot be the path of a model: {error}") from error
    return place
