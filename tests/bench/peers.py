"""Peers at the same bits and block on the demo model, their weights evaluated as ours are: one markdown table.

Each quantizer gets the float weights of all decoder layers (lm_head: round to nearest at 4 bits for everyone), blocks of
64, asymmetric. What it made is read back as float weights and put into the float model, so that only the choice of
codes differs. onnxruntime: MatMulNBitsQuantizer. MNN: its converter with --weightQuantBits, weights read back from
its runtime through an identity matrix.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from lowbit.passes.graph.match import matmul_weight
from lowbit.passes.graph.names import layer_name
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat, ZeroPoint
from lowbit.passes.registry import find_method
from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.convert.mnn.converter import convert
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.sections import Export
from lowbit.pipeline.report.text_quality import TextScores
from lowbit.pipeline.runtime.session import decoder_feeds, open_reference, open_session
from lowbit.pipeline.validate.dataset import token_windows
from lowbit.pipeline.validate.metrics import summarize
from lowbit.pipeline.validate.text import score_batch

MODEL = Path(__file__).parents[1] / "models" / "qwen2-pydocs"
RECIPE = "model: {model}\npasses: [{{quantize_matmul: {{bits: 4}}}}]\nvalidate: {{windows: 60}}\n"
BLOCK = 64
Weights = dict[str, np.ndarray]

READ_BACK = """
import sys, numpy as np
import MNN.nn as nn, MNN.expr as F
folder = sys.argv[1]
for name in sys.argv[2:]:
    k = int(np.load(f"{folder}/{name}.npy"))
    runtime = nn.create_runtime_manager(({"backend": 0, "numThread": 1, "precision": 1, "memory": 0},))
    module = nn.load_module_from_file(f"{folder}/{name}.mnn", ["x"], ["y"], runtime_manager=runtime)
    out = module.forward(F.const(np.eye(k, dtype=np.float32).ravel().tolist(), [1, k, k], F.NCHW, F.float))
    np.save(f"{folder}/{name}.npy", np.array(out.read()).reshape(k, -1).T)
"""


def ours(weights: Weights, bits: int, method: str, zero_point: ZeroPoint) -> Weights:
    form = BlockFormat(bits, BLOCK, False, "fp16", zero_point)
    return {n: find_method(method)().quantize(w, form).dequantize(w.shape[1]) for n, w in weights.items()}


def onnxruntime_default(weights: Weights, bits: int) -> Weights:
    """onnxruntime's MatMulNBitsQuantizer, default algorithm, read back by dequantizing its own nodes' inputs."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    made = {}
    for name, w in weights.items():
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits, accuracy_level=0)
        quantizer = MatMulNBitsQuantizer(_one_matmul(w), bits=bits, algo_config=config)
        quantizer.process()
        session = open_session(quantizer.model.model, Path.cwd())
        made[name] = session.run(None, {"x": np.eye(w.shape[1], dtype=np.float32)[None]})[0][0].T
    return made


def mnn_converter(weights: Weights, bits: int, *options: str) -> Weights:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for i, w in enumerate(weights.values()):
            onnx.save(_one_matmul(w), str(folder / f"{i}.onnx"))
            np.save(folder / f"{i}.npy", w.shape[1])
            flags = (f"--weightQuantBits={bits}", f"--weightQuantBlock={BLOCK}", *options)
            convert("ONNX", folder / f"{i}.onnx", folder / f"{i}.mnn", *flags)
        names = [str(i) for i in range(len(weights))]
        subprocess.run([sys.executable, "-c", READ_BACK, scratch, *names], check=True, capture_output=True)
        return {name: np.load(folder / f"{i}.npy") for i, name in enumerate(weights)}


def _one_matmul(w: np.ndarray) -> onnx.ModelProto:
    n, k = w.shape
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "m", size]) for name, size in (("x", k), ("y", n)))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(np.ascontiguousarray(w.T), "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


class Evaluation:
    """The float model with other weights, against itself."""

    def __init__(self, scratch: Path) -> None:
        self.checkpoint = open_checkpoint(MODEL, str(MODEL))
        self.graph_file = scratch / "graph.onnx"
        export_graph(self.checkpoint, Export(), self.graph_file)
        self.reference = open_reference(load_graph(self.graph_file, self.checkpoint))
        self.windows = token_windows(_recipe(scratch), self.checkpoint)
        self.layers = {name: constant.load() for name, (_, constant) in self._matmuls(self._graph()).items()}

    def _graph(self) -> gs.Graph:
        return load_graph(self.graph_file, self.checkpoint)

    @staticmethod
    def _matmuls(graph: gs.Graph) -> dict[str, tuple[gs.Node, gs.Constant]]:
        found = {}
        for node in graph.nodes:
            operand = matmul_weight(node) if node.op == "MatMul" else None
            if operand is not None:
                found[layer_name(operand.constant.name, node.name, operand.shared)] = node, operand.weight
        return found

    def weights(self) -> Weights:
        return {name: w.astype(np.float32) for name, w in self.layers.items() if name != "lm_head"}

    def of(self, weights: Weights) -> TextScores:
        head = self.layers["lm_head"].astype(np.float32)
        head = Rtn().quantize(head, BlockFormat(4, BLOCK, False, "fp16")).dequantize(head.shape[1])
        graph = self._graph()
        for name, (node, _) in self._matmuls(graph).items():
            new = head if name == "lm_head" else weights[name]
            node.inputs[1] = gs.Constant(f"{name}.replaced", np.ascontiguousarray(new.T, np.float32))
        graph.cleanup()
        candidate = open_session(gs.export_onnx(graph), MODEL)
        scores = []
        for ids in np.split(self.windows, range(8, len(self.windows), 8)):
            expected, found = (one.run(["logits"], decoder_feeds(one, ids))[0] for one in (self.reference, candidate))
            scores.append(score_batch(expected, found, ids))
        return summarize(np.concatenate(scores))


def _recipe(scratch: Path) -> Recipe:
    path = scratch / "peers.yaml"
    path.write_text(RECIPE.format(model=MODEL), "utf-8")
    return load_recipe(path)


def main() -> None:
    rows: list[tuple[str, Callable[[Weights, int], Weights], tuple[int, ...]]] = [
        ("onnxruntime MatMulNBitsQuantizer", onnxruntime_default, (4, 2)),
        ("MNN converter", mnn_converter, (4, 3, 2)),
        ("MNN converter --hqq", lambda w, b: mnn_converter(w, b, "--hqq"), (4, 3, 2)),
    ]
    for zero_point, kind in (("integer", ""), ("float", ", float zero points")):
        for method in ("rtn", "mse", "hqq"):
            rows.append((f"lowbit {method}{kind}", partial(ours, method=method, zero_point=zero_point), (4, 3, 2)))
    print("| KL (nats/token), perplexity | 4 bits | 3 bits | 2 bits |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = Evaluation(Path(scratch))
        for name, quantize, able in rows:
            cells = []
            for bits in (4, 3, 2):
                found = evaluation.of(quantize(evaluation.weights(), bits)) if bits in able else None
                cells.append(f"{found.kl_divergence:.4f}, {found.perplexity:.2f}" if found else "not possible")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
