"""The embedding table, which MNN's LLM runtime keeps in a file of its own and reads row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.quant.pack import unpack_codes, unpack_lsb
from lowbit.passes.quant.weights import Weight, weight_of
from lowbit.pipeline.convert.mnn.weights import MnnLayer
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.stored_layer import StoredLayer


class Embedding(Protocol):
    """A table [vocabulary, hidden]."""

    @property
    def hidden(self) -> int: ...

    @property
    def file(self) -> str:
        """Its file in MNN's folder."""

    @property
    def config(self) -> dict[str, Any]:
        """What llm_config.json says about it."""

    def look_up(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Rows [len(ids), hidden]."""

    def write(self, folder: Path) -> None:
        """Write the file, in streams."""


@dataclass(frozen=True)
class FloatEmbedding:
    """A table in bf16 or fp16, bit for bit as in the ONNX file."""

    weight: Weight

    @property
    def hidden(self) -> int:
        return int(self.weight.shape[1])

    @property
    def _dtype(self) -> str:
        return "bf16" if self.weight.onnx_dtype == TensorProto.BFLOAT16 else "fp16"

    @property
    def file(self) -> str:
        return f"embeddings_{self._dtype}.bin"

    @property
    def config(self) -> dict[str, Any]:
        return {} if self._dtype == "bf16" else _tie(16, 0, 0, 0, "fp16")

    def look_up(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.concatenate([self.weight.rows(int(i), int(i) + 1) for i in ids]).astype(np.float32)

    def write(self, folder: Path) -> None:
        with (folder / self.file).open("wb") as stream:
            for _, rows in self.weight.chunks():
                stream.write(np.ascontiguousarray(rows).view(np.uint8).data)


@dataclass(frozen=True)
class QuantizedEmbedding:
    """A table of 4- or 8-bit codes: the codes of the ONNX file, then (offset, scale) of each block."""

    placed: MnnLayer

    @property
    def layer(self) -> StoredLayer:
        return self.placed.layer

    @property
    def hidden(self) -> int:
        return self.layer.k

    @property
    def file(self) -> str:
        return f"embeddings_int{self.layer.bits}.bin"

    @property
    def config(self) -> dict[str, Any]:
        codes = self.layer.n * self.layer.k * self.layer.bits // 8
        return _tie(self.layer.bits, self.layer.block_size, codes, self.placed.sizes[1], self.placed.scale_dtype)

    def look_up(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        layer = self.layer
        rows = []
        for i in map(int, ids):
            codes = unpack_codes(layer.codes.rows(i, i + 1), layer.bits, layer.k).reshape(layer.blocks, -1)
            assert layer.zero_points is not None  # quantize_embedding always makes them
            zeros = unpack_lsb(layer.zero_points.rows(i, i + 1), layer.bits, layer.blocks)[0].astype(np.float32)
            scales = layer.scales.rows(i, i + 1)[0].astype(np.float32)
            rows.append(((codes - zeros[:, None]) * scales[:, None]).reshape(-1))
        return np.array(rows, np.float32)

    def write(self, folder: Path) -> None:
        with (folder / self.file).open("wb") as stream:
            self.placed.write_codes(stream)
            self.placed.write_alpha(stream)


def find_embedding(graph: gs.Graph, stored: dict[str, StoredLayer], scale_dtype: Any) -> Embedding:
    """The table that `input_ids` are looked up in, ready for MNN; see `embedding_table`."""
    table = embedding_table(graph)
    if isinstance(table, str):
        return QuantizedEmbedding(MnnLayer(stored[table], None, scale_dtype, 0))
    return FloatEmbedding(table)


def embedding_table(graph: gs.Graph) -> Weight | str:
    """The half-precision table that `input_ids` are looked up in, or the name of the quantized one.

    Raises:
        ConvertError: MNN has no file for it.
    """
    lookups = [n for n in graph.nodes if n.op in ("Gather", "GatherBlockQuantized") and n.inputs[1].name == "input_ids"]
    if len(lookups) != 1:
        raise ConvertError(f"expected one lookup of input_ids in the graph, found {len(lookups)}.")
    if lookups[0].op == "GatherBlockQuantized":
        return str(lookups[0].name)
    constant = lookups[0].inputs[0]
    if not isinstance(constant, gs.Constant):
        raise ConvertError("the embedding is widened before it is looked up; add `- narrow_embedding` to passes.")
    weight = weight_of(constant)
    if weight.onnx_dtype not in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
        raise ConvertError(
            "MNN stores float embeddings as bf16 or fp16, this table is float32. Add `- narrow_embedding: {dtype: fp16}` "
            "(or bf16) to passes, behind which the rounding is part of what is validated; or quantize_embedding."
        )
    return weight


def _tie(bits: int, block: int, alpha_offset: int, alpha_size: int, alpha_dtype: str) -> dict[str, Any]:
    place = {"weight_offset": 0, "alpha_offset": alpha_offset, "alpha_size": alpha_size}
    return {"tie_embeddings": {**place, "quant_bit": bits, "quant_block": block, "alpha_dtype": alpha_dtype}}
