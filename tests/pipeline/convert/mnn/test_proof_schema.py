"""What MNN's files say of themselves: a place that is not as it was written is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.convert.mnn.proof_schema import Convolution, Graph, ModelFacts, checked, read_part
from lowbit.pipeline.errors import ConvertError, PipelineError

LAYER: dict[str, Any] = {
    "common": {"outputCount": 16, "inputCount": 32}, "quanParameter": {"aMaxOrBits": 4, "readType": 0},
    "external": [0, 1, 2, 3, 0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"common": None}, "llm.mnn: common is not as lowbit writes it"),
        ({"common": {"outputCount": -1, "inputCount": 1}}, "common.outputCount is not"),
        ({"common": {"outputCount": 1 << 60, "inputCount": 1}}, "common.outputCount is not"),
        ({"quanParameter": {"aMaxOrBits": 64, "readType": 0}}, "quanParameter.aMaxOrBits is not"),
        ({"external": [0, 1]}, "external is not"),
        ({"external": [0, 1, -2, 3]}, "external.2 is not"),
    ],
)
def test_what_is_odd_of_a_layer_is_named(changes: dict[str, Any], message: str) -> None:
    assert checked(Convolution, LAYER, "llm.mnn").common.n == 16
    with pytest.raises(ConvertError, match=message):
        checked(Convolution, LAYER | changes, "llm.mnn")


def test_a_graph_is_a_list_of_operators() -> None:
    with pytest.raises(ConvertError, match="oplists is not as lowbit writes it"):
        checked(Graph, {"oplists": {}}, "llm.mnn")


@pytest.mark.parametrize("text", ["[" * 5000, "[1", '{"a": 1, "a": 2}', json.dumps({"tie_embeddings": {"quant_bit": "4"}})])
def test_a_file_is_json_of_that_form(tmp_path: Path, text: str) -> None:
    file = tmp_path / "llm_config.json"
    file.write_text(text, "utf-8")
    with pytest.raises(ConvertError, match=r"llm_config.json: .*Run the recipe again"):
        read_part(ModelFacts, file)
    file.unlink()
    with pytest.raises(PipelineError, match="cannot be opened"):
        read_part(ModelFacts, file)
