"""What a proof reads of MNN's files -> checked: such a folder may be a stranger's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowbit.pipeline.checkpoint.files import parse_json, regular_file
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.limits import TEXT_BYTES

Place = Annotated[int, Field(ge=0, le=1 << 48)]
"""A number of bytes, or one of rows and columns; beyond all files."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Operator(_Part):
    """One of the graph; what it is made of depends on its type."""

    name: str = ""
    type: str
    main: Any = None


class Graph(_Part):
    """An MNN file in the converter's JSON form."""

    operators: list[Operator] = Field(alias="oplists")


class Common(_Part):
    """The shape of a convolution."""

    n: Place = Field(alias="outputCount")
    k: Place = Field(alias="inputCount")


class Quantization(_Part):
    """How a convolution's weight is stored."""

    bits: Literal[2, 3, 4, 8] = Field(alias="aMaxOrBits")
    read_type: int = Field(alias="readType")
    wide: bool = Field(default=False, alias="shapeInt32")
    scale_storage: str = Field(default="", alias="scaleStorage")


class Convolution(_Part):
    """A layer, and where its bytes lie: the first, and how many for codes, scales and bias."""

    common: Common
    quantization: Quantization = Field(alias="quanParameter")
    external: Annotated[list[Place], Field(min_length=4)]


class QuantizedTable(_Part):
    """Where a quantized embedding lies in its file, by llm_config.json."""

    bits: int = Field(alias="quant_bit")
    block_size: int = Field(alias="quant_block")
    weight_offset: Place
    alpha_offset: Place
    alpha_dtype: Literal["fp16", "fp32"]


class ModelFacts(_Part):
    """llm_config.json."""

    table: QuantizedTable = Field(alias="tie_embeddings")


class RunFacts(_Part):
    """config.json."""

    embedding_file: str


PartT = TypeVar("PartT", bound=_Part)


def checked(kind: type[PartT], value: Any, what: str) -> PartT:
    """A part of `what`.

    Raises:
        ConvertError: it is not of that form; names the first place.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        why = first["msg"].lower()
        raise ConvertError(f"{what}: {place} is not as lowbit writes it: {why}. Run the recipe again.") from error


def read_part(kind: type[PartT], file: Path) -> PartT:
    """A JSON file.

    Raises:
        CheckpointError, ConvertError: it is missing, a link, no JSON or of another form.
    """
    try:
        return checked(kind, parse_json(regular_file(file, TEXT_BYTES).read_bytes()), file.name)
    except ValueError as error:
        raise ConvertError(f"{file}: not readable as JSON: {error}. Run the recipe again.") from error
