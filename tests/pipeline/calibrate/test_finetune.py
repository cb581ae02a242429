"""Training codes and scales: torch's model is the graph's, training helps, and the same seed gives the same bytes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from lowbit.passes.base import PassError
from lowbit.passes.methods.mse import Mse
from lowbit.passes.quant.format import BlockFormat, ZeroPoint
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import ArrayWeight
from lowbit.passes.registry import find_pass
from lowbit.pipeline.calibrate.fake_quant_linear import TrainedLinear
from lowbit.pipeline.calibrate.finetune import finetune
from lowbit.pipeline.calibrate.training import warm_rate
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.onnx_io.entry import entry_of
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.runtime import memory
from lowbit.pipeline.runtime.session import decoder_feeds, open_reference
from lowbit.pipeline.runtime.torch_decoder import TorchDecoder
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests
from tests.conftest import PYDOCS, Exported
from tests.graphs import weights_of
from tests.running import run_in_process
from tests.tiny import recipe_text

IDS = np.random.default_rng(0).integers(1, 300, (6, 16))


def marked(exported: Exported, kind: str = "qwen2", training: str = "{}", **options: Any) -> Any:
    """A checkpoint and its graph at 2 bits by rtn, marked to be trained."""
    checkpoint, graph = exported(kind, **options)
    find_pass("quantize_matmul").model_validate_json('{"bits": 2, "block_size": 32}').apply(graph)
    outcome = find_pass("finetune_blocks").model_validate_json(training).apply(graph)
    return checkpoint, graph, outcome


def trained(exported: Exported, root: Path, training: str) -> dict[str, dict[str, str]]:
    checkpoint, graph, _ = marked(exported, training=training)
    store = Store(root)
    entries = {w: entry_of(w, SourceDigests(store), store) for w in weights_of(graph).values()}
    shares: list[float] = []
    found = finetune(graph, checkpoint, IDS, entries, store, lambda done, _: shares.append(done))
    assert shares == sorted(shares)
    return {weight.name: entry.files for weight, entry in found.items()}


@pytest.mark.parametrize(("kind", "options"), [("qwen2", {}), ("qwen3", {}), ("llama", {"tie_word_embeddings": True})])
def test_torchs_blocks_are_those_of_the_graph(exported: Exported, kind: str, options: dict[str, bool]) -> None:
    checkpoint, whole = exported(kind, **options)
    expected = open_reference(whole).run(["logits"], decoder_feeds(whole, IDS))[0]
    _, graph, _ = marked(exported, kind, **options)
    decoder = TorchDecoder.of_graph(checkpoint, graph)
    with torch.no_grad():
        x = decoder.embed(torch.from_numpy(IDS))
        for number in range(2):
            x = decoder.run(decoder.block(number), x)
        model = decoder.whole()
        found = model.lm_head(model.model.norm(x)).numpy()
        at_once = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(at_once, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("zero_point", ["integer", "float"])
@pytest.mark.parametrize("k", [64, 44])
def test_a_layer_begins_and_ends_as_its_codes(k: int, zero_point: ZeroPoint) -> None:
    rows = np.random.default_rng(0).standard_normal((24, k)).astype(np.float32)
    form = BlockFormat(3, 32, False, "fp16", zero_point)
    weight, blocks = QuantizedWeight("w", ArrayWeight(rows), form, Mse()), Mse().quantize(rows, form)
    plain = torch.nn.Linear(k, 24)
    plain.weight.data = torch.from_numpy(rows)
    linear = TrainedLinear(weight, blocks, plain)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((5, k)).astype(np.float32))
    expected = x @ torch.from_numpy(blocks.dequantize(k)).T + plain.bias
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-5)
    again = linear.blocks()
    for name in ("codes", "scales"):
        np.testing.assert_array_equal(getattr(again, name), getattr(blocks, name))
    np.testing.assert_allclose(again.zero_points, blocks.zero_points, rtol=0, atol=1e-5 if form.free else 0)
    optimizer = torch.optim.Adam([linear.latent, *linear.grid], lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (linear(x) - plain(x)).square().mean()
        loss.backward()
        optimizer.step()
    ended = linear.blocks()
    assert ended.codes.max() <= 7
    with torch.no_grad():
        before, after = ((one - plain(x)).square().mean() for one in (expected, linear(x)))
        settled = TrainedLinear(weight, ended, plain)(x)
    assert after < 0.3 * before
    torch.testing.assert_close(settled, linear(x).detach(), rtol=0, atol=2e-2)


def test_the_same_seed_gives_the_same_bytes_and_a_stopped_run_goes_on(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = '{"epochs": 2, "end_to_end": 1, "batch": 2}'
    whole = trained(exported, tmp_path / "whole", options)
    assert trained(exported, tmp_path / "again", options) == whole
    other = trained(exported, tmp_path / "again", options.replace("}", ', "seed": 1}'))
    assert other != whole
    put, count = Store.put, [0]

    def stops_in_the_second_block(self: Store, key: str, write: Any) -> Any:
        count[0] += 1
        if count[0] == 15 + 7 + 3:
            raise KeyboardInterrupt
        return put(self, key, write)

    monkeypatch.setattr(Store, "put", stops_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        trained(exported, tmp_path / "stopped", options)
    count[0] = -1000
    assert trained(exported, tmp_path / "stopped", options) == whole
    count[0] = 0
    assert trained(exported, tmp_path / "stopped", options) == whole
    assert count[0] == 0, "all of it was recalled"


@pytest.mark.slow
def test_training_makes_two_bits_better(tmp_path: Path, store: Store) -> None:
    """On the trained model, after mse: blocks alone help, by either optimizer; the whole model together helps more."""
    divergence = []
    one = "epochs: 1, batch: 4"
    kinds = (
        "",
        f"finetune_blocks: {{{one}, optimizer: sign}}",
        *(f"finetune_blocks: {{{one}, end_to_end: {n}}}" for n in (0, 1)),
    )
    for training in kinds:
        path = tmp_path / "mine.yaml"
        passes = ["narrow_embedding", "quantize_matmul: {bits: 2, block_size: 64, method: mse, exclude: [lm_head]}"]
        passes += ["quantize_matmul: {bits: 4, block_size: 64}", *([training] if training else [])]
        section = "calibrate: {windows: 32, window: 128}" if training else ""
        path.write_text(recipe_text(PYDOCS, *passes, convert=section, validate="validate: {windows: 4}"), "utf-8")
        folder = run_in_process(load_recipe(path), tmp_path / "build", store)
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        divergence.append(manifest["quality"]["onnxruntime"]["kl_divergence"])
        methods = {w["method"] for w in manifest["weights"].values()}
        assert methods == ({"mse + finetune_blocks", "rtn + finetune_blocks"} if training else {"mse", "rtn"})
    none, signs, blocks, whole = divergence
    assert signs < 0.95 * none
    assert whole < blocks < 0.95 * none


def test_what_is_marked_and_what_is_left_alone(exported: Exported) -> None:
    _, graph, outcome = marked(exported, training='{"include": ["*.mlp.*"], "exclude": ["*.1.mlp.down_proj"]}')
    found = weights_of(graph)
    assert {name for name, weight in found.items() if weight.training is not None} == set(outcome.rewritten)
    assert len(outcome.rewritten) == 5
    assert outcome.skipped["model.layers.1.mlp.down_proj"] == "excluded by '*.1.mlp.down_proj'"
    with pytest.raises(PassError, match="finetune_blocks is here twice"):
        find_pass("finetune_blocks")().apply(graph)
    bare: gs.Graph = exported("qwen2")[1]
    with pytest.raises(PassError, match="no quantized MatMul found; put quantize_matmul before it"):
        find_pass("finetune_blocks")().apply(bare)


def test_mistakes(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_needed", lambda checkpoint: 1 << 60)
    with pytest.raises(PipelineError, match="end_to_end trains the whole model at once, and the weights in float need"):
        trained(exported, tmp_path, '{"end_to_end": 1}')
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text("./x", "quantize_matmul: {bits: 3}", "finetune_blocks"), "utf-8")
    with pytest.raises(RecipeError, match=r"mine.yaml:4:5: finetune_blocks looks at the inputs of layers here"):
        load_recipe(path)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [warm_rate(i / 100) for i in range(101)]
    assert max(rates) <= 1
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[6:]))
