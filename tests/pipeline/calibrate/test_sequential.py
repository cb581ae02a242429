"""Calibration: inputs as torch sees them, the same bytes however a run is cut up, and every mistake a sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from rich.console import Console

from lowbit.passes.registry import find_pass
from lowbit.pipeline.calibrate.activations import PairedActivations
from lowbit.pipeline.calibrate.correction import Correction
from lowbit.pipeline.calibrate.dataset import calibration_windows, docstrings
from lowbit.pipeline.calibrate.generate import generate
from lowbit.pipeline.calibrate.sequential import calibrate
from lowbit.pipeline.calibrate.subgraphs import PartitionedGraph
from lowbit.pipeline.checkpoint.huggingface import Checkpoint, open_checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.sections import Calibrate
from lowbit.pipeline.runtime.session import decoder_feeds, open_reference, weight_folder
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests
from tests.conftest import CORES, PYDOCS, Exported
from tests.pipeline.chat_templates import TEMPLATES
from tests.running import run_in_process
from tests.tiny import recipe_text

ROOT = Path(__file__).parents[3]
IDS = np.random.default_rng(0).integers(1, 300, (6, 16))
QUIET = Console(quiet=True)


def quantized(exported: Exported, kind: str = "qwen2", method: str = "refine", **options: Any) -> tuple[Checkpoint, gs.Graph]:
    checkpoint, graph = exported(kind, **options)
    find_pass("narrow_embedding")().apply(graph)
    for one in ({"bits": 4, "include": ["lm_head"], "method": method}, {"bits": 2, "method": method}):
        find_pass("quantize_matmul").model_validate_json(json.dumps({"block_size": 32, **one})).apply(graph)
    return checkpoint, graph


@pytest.mark.parametrize(("kind", "options"), [("qwen2", {}), ("qwen3", {}), ("llama", {"tie_word_embeddings": True})])
def test_the_float_model_goes_through_the_subgraphs_unchanged(
    exported: Exported, kind: str, options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit.pipeline.calibrate.activations.LARGE", 20_000)  # some tensors in memory, some on the disk
    _, whole = exported(kind, **options)
    expected = open_reference(whole).run(["logits"], decoder_feeds(whole, IDS))[0]
    _, graph = quantized(exported, kind, **options)
    partitioned = PartitionedGraph(graph, weight_folder(graph))
    assert [sorted(p.weight.name.rpartition(".")[2] for p in subgraph.products) for subgraph in partitioned.subgraphs] == [
        *[["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2,
        ["lm_head"],
    ]
    activations = PairedActivations(partitioned, tmp_path, [decoder_feeds(graph, ids) for ids in np.split(IDS, 2)])
    for number, subgraph in enumerate(partitioned.subgraphs):
        activations.run(number)
        for product in subgraph.products:
            activations.multiply_exact(product)
        activations.quantized = [dict(state) for state in activations.exact]
        if number < len(partitioned.subgraphs) - 1:
            activations.release(number)
    found = np.concatenate([state[partitioned.subgraphs[-1].products[0].y] for state in activations.exact])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_moments_and_targets_are_those_of_torch(exported: Exported, tmp_path: Path) -> None:
    """The first layer's second moments, and the weights that least squares would choose for disturbed inputs."""
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint, graph = quantized(exported)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    seen: list[np.ndarray] = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().reshape(-1, 64).numpy()))
    model(torch.from_numpy(IDS))
    x = seen[0].astype(np.float64)
    activations = PairedActivations(
        PartitionedGraph(graph, weight_folder(graph)), tmp_path, [decoder_feeds(graph, ids) for ids in np.split(IDS, 3)]
    )
    activations.run(0)
    product = next(p for p in activations.partitioned.subgraphs[0].products if p.weight.name.endswith("q_proj"))
    hessian = activations.moments(product.x)
    np.testing.assert_allclose(hessian.matrix, x.T @ x / len(x), rtol=0, atol=1e-5 * np.abs(x.T @ x / len(x)).max())
    for state in activations.quantized:
        state[product.x] = state[product.x] + np.float32(0.1) * np.sin(np.arange(64, dtype=np.float32))
    moved = np.concatenate([state[product.x].reshape(-1, 64) for state in activations.quantized]).astype(np.float64)
    hessian = activations.moments(product.x)
    h = moved.T @ moved / len(moved)
    h += 0.01 * np.diag(h).mean() * np.eye(64)
    w = product.weight.source.load().astype(np.float64)
    expected = w + ((x @ w.T - moved @ w.T).T @ moved / len(moved)) @ np.linalg.inv(h)
    np.testing.assert_allclose(
        Correction(activations.drift(product.x), hessian)(product.weight.source.load()),
        expected,
        rtol=0,
        atol=1e-3 * np.abs(expected).max(),
    )


def made(graph: gs.Graph, root: Path, **options: Any) -> dict[str, str]:
    store = Store(root)
    found = calibrate(graph, Calibrate(**options), IDS, SourceDigests(store), store, lambda done, rate: None)
    return {weight.name: entry.files["codes"] for weight, entry in found.entries.items()}


@pytest.mark.parametrize("method", ["weighted_mse", "gptq", "refine"])
def test_every_stop_and_start_gives_the_same_codes(
    exported: Exported, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in every stage, with states saved between layers: the codes of an undisturbed run, none made twice."""
    expected = made(quantized(exported, method=method)[1], tmp_path / "whole")
    assert len(expected) == 15
    monkeypatch.setattr("lowbit.pipeline.calibrate.saved_states.SAVE_SECONDS", 0)
    put, count = Store.put, [0]

    def stops_after_some(self: Store, key: str, write: Callable[[Path], dict[str, Any]]) -> Any:
        count[0] += 1
        if count[0] > 4:
            raise KeyboardInterrupt
        return put(self, key, write)

    monkeypatch.setattr(Store, "put", stops_after_some)
    saved = 0
    for _ in range(20):
        count[0] = 0
        try:
            found = made(quantized(exported, method=method)[1], tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            saved = max(saved, len(list((tmp_path / "stopped").rglob("exact-*.npy"))))
    assert found == expected
    assert saved > 0, "states were saved on the way ..."
    assert not list((tmp_path / "stopped").rglob("*.npy")), "... and are gone at the end"


def test_only_what_a_change_can_reach_is_made_again(exported: Exported, tmp_path: Path) -> None:
    made(quantized(exported)[1], tmp_path)
    _, graph = exported("qwen2")
    find_pass("narrow_embedding")().apply(graph)
    kind = find_pass("quantize_matmul")
    for one in (
        '{"bits": 3, "block_size": 32, "method": "refine", "include": ["model.layers.1.mlp.down_proj"]}',
        '{"bits": 4, "block_size": 32, "method": "refine", "include": ["lm_head"]}',
        '{"bits": 2, "block_size": 32, "method": "refine"}',
    ):
        kind.model_validate_json(one).apply(graph)
    store = Store(tmp_path)
    found = calibrate(graph, Calibrate(), IDS, SourceDigests(store), store, lambda done, rate: None)
    assert found.made == 2, "that layer, and the one after it, whose inputs have changed"


@pytest.mark.slow
def test_errors_of_earlier_layers_are_made_up_for(tmp_path: Path, store: Store) -> None:
    """On the trained model: mse, gptq and refine in this order, and looking at what came before helps."""
    divergence = {}
    for name, method, section in (
        ("mse", "mse", ""),
        ("gptq", "gptq", "calibrate: {windows: 32, window: 128, asymmetric: false}"),
        ("refine", "refine", "calibrate: {windows: 32, window: 128, asymmetric: false}"),
        ("asymmetric", "refine", "calibrate: {windows: 32, window: 128}"),
    ):
        path = tmp_path / f"{name}.yaml"
        passes = (
            "narrow_embedding",
            "quantize_matmul: {bits: 4, block_size: 64, include: [lm_head]}",
            f"quantize_matmul: {{bits: 2, block_size: 64, method: {method}}}",
        )
        path.write_text(recipe_text(PYDOCS, *passes, convert=section, validate="validate: {windows: 4}"), "utf-8")
        folder = run_in_process(load_recipe(path), tmp_path / "build", store)
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        divergence[name] = manifest["quality"]["onnxruntime"]["kl_divergence"]
    assert divergence["asymmetric"] < divergence["refine"] < divergence["gptq"] < divergence["mse"]
    assert divergence["asymmetric"] < 0.4 * divergence["mse"]


GENERATE = """
import sys
from pathlib import Path
from lowbit.pipeline.calibrate.generate import generate
from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
model = Path(sys.argv[1])
print(generate(open_checkpoint(model, "m"), ["def f(x):", "", "The module"], 9, 32, 5).tolist())
"""


def test_what_the_model_writes_does_not_depend_on_the_cores(tiny: Callable[..., Path]) -> None:
    found = []
    for cores in (1, 2):
        command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {CORES[:cores]})\n{GENERATE}", str(tiny())]
        found.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert found[0] == found[1]
    assert np.array(eval(found[0])).shape == (9, 32)


def test_generated_text_is_the_models_own() -> None:
    """The trained model finds its own text far likelier than it finds docstrings, and prompts begin it."""
    checkpoint = open_checkpoint(PYDOCS, "pydocs")
    ids = generate(checkpoint, ["The following example"], 4, 64, 0)
    again = generate(checkpoint, ["The following example"], 4, 64, 1)
    assert (ids[0, :3] == again[0, :3]).all(), "the same prompt ..."
    assert (ids != again).any(), "... another seed"


def test_prompts_begin_as_every_other_conversation(tmp_path: Path) -> None:
    """By the template that chats and engines use, here one of several that have names."""
    shutil.copytree(PYDOCS.with_name("llama-reasoner"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATES["chatml"]}]
    path.write_text(json.dumps(config | {"chat_template": templates}))
    checkpoint = open_checkpoint(tmp_path, "reasoner")
    ids = generate(checkpoint, ["1+2"], 1, 128, 0)
    text = "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
    expected = load_tokenizer(checkpoint).encode(text, add_special_tokens=False).ids
    assert ids[0, : len(expected)].tolist() == expected


def test_library_text_is_never_what_validation_reads(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    from pydoc_data.topics import topics

    texts = docstrings()
    everything = "\n".join(topics.values())
    assert len(texts) > 500
    assert not any(text[:150] in everything for text in texts)
    checkpoint = open_checkpoint(tiny(), "tiny")
    options, store = Calibrate(windows=3, window=32), Store(tmp_path)
    one, two = (calibration_windows(options, tmp_path, checkpoint, "", store) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (3, 32)
    other = calibration_windows(Calibrate(windows=3, window=32, seed=1), tmp_path, checkpoint, "", store)
    assert (one != other).any()


def test_texts_that_do_not_serve(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    checkpoint, store = open_checkpoint(tiny(), "tiny"), Store(tmp_path / "store")
    (tmp_path / "short.txt").write_text("too short")
    for options, message in (
        (Calibrate(text="none.txt"), r"calibrate: text: .*none.txt: cannot be read as UTF-8"),
        (Calibrate(text="short.txt"), r"the text has \d+ tokens, 128 windows of 256 need 32,768"),
        (Calibrate(text="generated", prompts="none.txt"), r"calibrate: prompts: .*none.txt: cannot be read"),
    ):
        with pytest.raises(PipelineError, match=message):
            calibration_windows(options, tmp_path, checkpoint, "", store)


@pytest.mark.parametrize(
    ("section", "method", "message"),
    [
        ("", "gptq", r"mine.yaml:3:5: quantize_matmul looks at the inputs of layers here; say which text makes them"),
        ("calibrate: {}", "mse", r"mine.yaml:4:12: no pass looks at inputs.*: awq, gptq, refine, signround, weighted_mse"),
        ("calibrate: {windws: 3}", "gptq", r"mine.yaml:4:13: unknown option 'windws'. Did you mean 'window"),
    ],
)
def test_recipes_that_contradict_themselves(tmp_path: Path, section: str, method: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text("./x", f"quantize_matmul: {{bits: 3, method: {method}}}", validate=section), "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
