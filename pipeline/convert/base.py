"""What every engine's hand-off does: rehearse, lower, write, prove, compare."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.chat_engine import ChatEngine
from lowbit.pipeline.convert.sizes import Sizes
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.recipe.sections import Convert
from lowbit.pipeline.report.engine_quality import Compared
from lowbit.pipeline.runtime.layerwise import LayerwiseModel
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import decoder_feeds, load_model, set_accuracy_level
from lowbit.pipeline.validate.greedy import NEW_TOKENS
from lowbit.pipeline.validate.metrics import relative_error

PROBE = 64
"""Tokens that a lowered graph is compared with the quantized one on."""
QUICK_TOKENS = 8
"""Tokens that an engine writes in a quick comparison."""
LOWERING_TOLERANCE = 1e-5
"""Largest relative difference of logits between the quantized graph and the lowered one, both float32."""


OptionsT = TypeVar("OptionsT", bound=Convert)


@dataclass(frozen=True)
class Proof:
    """All weights compared and found equal: how many, in how many layers."""

    layers: int
    weights_checked: int


class Target(ABC, Generic[OptionsT]):
    """One engine's folder in the making, from a quantized graph that was written to `model_file`.

    Attributes:
        label: what tables call the engine.
        modes: the ways that it computes in `compare`, by their names there, and what tables call them; the first is in float
            arithmetic.
        weight_files: the files that hold weights: of a changed one, `check` says which weight it is.
        packages: the engine, for the key of what it computes.
        sources: modules that run in the engine's own process, likewise.
        decoders: whether it takes models that generate text, or all others.
        usage: Python that opens the folder from within a result, for the model card; empty where there is nothing to show.
    """

    label: ClassVar[str]
    modes: ClassVar[dict[str, str]]
    weight_files: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]]
    sources: ClassVar[tuple[str, ...]] = ()
    decoders: ClassVar[bool] = True
    usage: ClassVar[str] = ""

    def __init__(self, options: OptionsT, checkpoint: Checkpoint) -> None:
        self.options = options
        self.checkpoint = checkpoint

    @property
    def new_tokens(self) -> int:
        """How many tokens the engine writes after each prompt where it is compared on text."""
        return QUICK_TOKENS if self.options.compare == "quick" else NEW_TOKENS

    @abstractmethod
    def sizes(self) -> Sizes:
        """What the folder will take."""

    @abstractmethod
    def rehearse(self, graph: gs.Graph) -> None:
        """Refuse now, before any weight is read, what would be refused later; `graph` is spoilt.

        Raises:
            PassError, ConvertError: what the engine cannot hold.
        """

    @abstractmethod
    def lower(self, graph: gs.Graph, model_file: Path, samples: list[Feeds]) -> float | None:
        """Rewrite `graph` in place for the engine and run it beside `model_file` in onnxruntime on the first sample.

        Returns:
            The relative difference of their logits; None where onnxruntime cannot run the lowered graph.

        Raises:
            PassError: the graph is not one that can be lowered.
            ConvertError: the lowered graph computes something else.
        """

    @abstractmethod
    def write(self, model_file: Path, folder: Path, scratch: Path, progress: Callable[[float], None]) -> tuple[str, ...]:
        """Fill `folder` from the graph that was lowered; returns remarks.

        Raises:
            ConvertError: the engine refuses the graph, or cannot hold a weight as it is.
        """

    @staticmethod
    @abstractmethod
    def prove(model_file: Path, folder: Path, scratch: Path) -> Proof:
        """Compare every code, scale, offset and bias of `folder` with `model_file`.

        Raises:
            ConvertError: something is missing or differs; names the first.
        """

    @staticmethod
    def missing() -> str | None:
        """Why the engine cannot be asked to run here, if it cannot."""
        return None

    @abstractmethod
    def compare(self, model_file: Path, folder: Path, samples: list[Feeds], scratch: Path) -> Compared:
        """Run `folder` in its engine and `model_file` in onnxruntime on `samples`, for decoders `input_ids` alone.

        Raises:
            ConvertError: in float arithmetic the two differ by more than rounding.
        """

    @classmethod
    def chat(cls, folder: Path, checkpoint: Checkpoint) -> ChatEngine:
        """Open `folder` to talk to it.

        Raises:
            ConvertError: the engine has no chat, or is not here.
        """
        raise ConvertError(f"{folder}: {cls.label} has no chat here. Use --runtime onnx.")


def check_lowered(graph: gs.Graph, model_file: Path, ids: npt.NDArray[np.int64], feeds: Feeds) -> float:
    """Relative difference of the logits of a lowered graph, given `feeds`, and of `model_file`, given token ids [tokens].

    Weights that the lowered graph kept lie where those of their name do in `model_file`.

    Raises:
        ConvertError: it is larger than rounding.
    """
    model = gs.export_onnx(graph)
    places = {t.name: t for t in onnx.load(str(model_file), load_external_data=False).graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(places[tensor.name])
    set_accuracy_level(model, 0)
    lowered, quantized = gs.import_onnx(model), gs.import_onnx(load_model(model_file, accuracy_level=0))
    expected = _logits(quantized, model_file.parent, decoder_feeds(quantized, ids[None]))
    error = relative_error(_logits(lowered, model_file.parent, feeds), expected)
    if not error <= LOWERING_TOLERANCE:
        raise ConvertError(
            f"the lowered graph computes other logits than the quantized one: relative difference {error:.1e}, "
            f"at most {LOWERING_TOLERANCE:.0e} is rounding. This is a bug in a lowering pass."
        )
    return error


def _logits(graph: gs.Graph, folder: Path, feeds: Feeds) -> npt.NDArray[np.float32]:
    """Logits of one run, block by block."""
    return next(LayerwiseModel(graph, folder, "logits").run([feeds], lambda done: None))
