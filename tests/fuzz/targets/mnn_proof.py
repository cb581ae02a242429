"""MNN's folder against a good model.onnx: lines are the graph in the converter's JSON, llm_config.json and config.json."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from lowbit.pipeline.convert.mnn.converter import parse_document
from lowbit.pipeline.convert.mnn.proof import prove_llm
from tests.fuzz.small_result import write_mnn, write_onnx
from tests.fuzz.target import Target

GRAPH = "llm.mnn"


def prepare(folder: Path) -> Target:
    model_file, here = write_onnx(folder / "onnx"), folder / "mnn"
    here.mkdir()
    parts = write_mnn(model_file, here, GRAPH)

    def attempt(data: bytes) -> None:
        graph, model, run, *_ = [*data.split(b"\n"), b"", b"", b""]
        (here / "llm_config.json").write_bytes(model)
        (here / "config.json").write_bytes(run)
        # the converter itself is a process of its own, too slow to be started a thousand times a second
        document = parse_document(graph, here / GRAPH)
        with mock.patch("lowbit.pipeline.convert.mnn.proof.read_json", return_value=document):
            prove_llm(model_file, here, here / GRAPH, folder)

    return Target([b"\n".join(parts)], attempt)
