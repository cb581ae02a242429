"""Exports against torch: prefill, one cached step, left padding; and checkpoints that must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.errors import ExportError
from lowbit.pipeline.export.bind import bind
from lowbit.pipeline.export.support import check_config, check_layers
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.sections import Export
from lowbit.pipeline.runtime.session import decoder_feeds, open_reference
from tests.conftest import Exported
from tests.tiny import LLAMA3

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-bf16": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sharded-fp32": ("qwen2", {"shards": True, "dtype": "float32"}),
    "qwen3-fp16": ("qwen3", {"dtype": "float16"}),
    "qwen3-moe": ("qwen3_moe", {}),
    "llama-bf16": ("llama", {}),
    "llama3-rope": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("mistral", {}),
    "mistral-sliding": ("mistral", {"sliding_window": 4}),
    "qwen2-sliding-and-full": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "smollm3-tied": ("smollm3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "phi3-partial-rotary-sliding": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 4}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "llama-biased-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "dtype": "float32"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_compute_what_torch_computes(exported: Exported, family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kind, options = FAMILIES[family]
    checkpoint, graph = exported(kind, **options)
    session = open_reference(graph)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(1, 300, (2, 8))
    mask = np.ones_like(ids)
    mask[1, :3] = 0  # left padding
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    names = [output.name for output in session.get_outputs()]

    def given(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Gemma's graphs count positions themselves."""
        return {name: value for name, value in feeds.items() if name in {one.name for one in session.get_inputs()}}

    shape = next(i.shape for i in session.get_inputs() if i.name == "past_key_values.0.key")
    feeds: dict[str, np.ndarray] = {
        i.name: np.zeros((2, shape[1], 0, shape[3]), np.float32) for i in session.get_inputs() if i.name.startswith("past")
    }
    feeds |= given({"input_ids": ids[:, :7], "attention_mask": mask[:, :7], "position_ids": positions[:, :7]})
    prefill = dict(zip(names, session.run(names, feeds), strict=True))
    with torch.no_grad():
        inputs = given({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        whole = model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits.numpy()
    real = mask[:, :7].astype(bool)
    np.testing.assert_allclose(prefill["logits"][real], whole[:, :7][real], atol=1e-4, rtol=1e-4)
    step = {n.replace("present", "past_key_values"): v for n, v in prefill.items() if n.startswith("present")}
    step |= given({"input_ids": ids[:, 7:], "attention_mask": mask, "position_ids": positions[:, 7:]})
    decoded = dict(zip(names, session.run(names, step), strict=True))["logits"]
    np.testing.assert_allclose(decoded[:, 0], whole[:, 7], atol=1e-4, rtol=1e-4)


def test_export_reads_no_weight(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The weights may be gone: the graph comes from config.json alone."""
    from lowbit.pipeline.export.exporter import export_graph

    folder = shutil.copytree(tiny("qwen2"), tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    export_graph(open_checkpoint(folder, "x"), Export(), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 200_000


@pytest.mark.parametrize(
    ("kind", "options", "rope"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_theta": 5e5, **LLAMA3}),
        ("phi3", {"rope_theta": 1e5, "partial_rotary_factor": 0.5}, {"rope_theta": 1e5, "partial_rotary_factor": 0.5}),
        (
            "gemma3",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
        ),
    ],
    ids=["default", "llama3", "partial", "by kind of layer"],
)
def test_configurations_of_transformers_5_export_the_same(
    tiny: Callable[..., Path], tmp_path: Path, kind: str, options: dict[str, Any], rope: dict[str, Any]
) -> None:
    """The same model, written by the other version, gives the same graph, its frequencies included."""
    from lowbit.pipeline.export.exporter import export_graph

    old = tiny(kind, **options)
    new = shutil.copytree(old, tmp_path / "copy")
    config = json.loads((new / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"):
        config.pop(name, None)
    config["dtype"] = config.pop("torch_dtype", config.get("dtype"))
    (new / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    for folder in (old, new):
        export_graph(open_checkpoint(folder, "x"), Export(), tmp_path / f"{folder.name}.onnx")
    assert (tmp_path / f"{old.name}.onnx").read_bytes() == (tmp_path / "copy.onnx").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported. Supported: bert, distilbert, gemma,"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of the type 'dynamic' changes its frequencies with"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}}, "RoPE of the type 'longrope'"),
        ({"rope_parameters": 3}, "rope_parameters is 3, expected a mapping"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "expected rope_theta in it, and rope_type"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}},
            },
            "transformers 4 knows only the default there",
        ),
        ({"model_type": "bert"}, "'bert' is a encoder|'bert' is an encoder"),
    ],
)
def test_configs_that_would_be_exported_as_something_else(
    tiny: Callable[..., Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(tiny("qwen2"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ExportError, match=message):
        check_config(open_checkpoint(folder, "x"), Export())


@pytest.mark.parametrize(
    ("kind", "option", "count", "message"),
    [
        ("qwen2", "num_hidden_layers", 1, "num_hidden_layers is 1, the weights have 2 layers"),
        ("qwen2", "num_hidden_layers", 3, "num_hidden_layers is 3, the weights have 2 layers"),
        ("bert", "num_hidden_layers", 1, "num_hidden_layers is 1, the weights have 2 layers"),
        ("distilbert", "n_layers", 3, "n_layers is 3, the weights have 2 layers"),
        ("vit", "num_hidden_layers", 1, "num_hidden_layers is 1, the weights have 2 layers"),
        ("qwen3_moe", "num_experts", 2, "num_experts is 2, the weights have 4 experts"),
        ("vit", "hidden_size", 1 << 16, "hidden_size is 65536, no weight has more than 128 rows or columns"),
        ("llama", "vocab_size", 1 << 20, "vocab_size is 1048576, no weight has more than 320 rows or columns"),
    ],
)
def test_what_the_weights_are_counted_by(
    tiny: Callable[..., Path], tmp_path: Path, kind: str, option: str, count: int, message: str
) -> None:
    folder = shutil.copytree(tiny(kind), tmp_path / "copy")
    check_layers(open_checkpoint(folder, "x"))
    config = json.loads((folder / "config.json").read_text()) | {option: count}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=message):
        check_layers(open_checkpoint(folder, "x"))


def test_a_checkpoint_of_the_hub_s_cache_is_read_through_its_links(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """snapshots/COMMIT/ links to blobs/; onnxruntime refuses links, so the blobs themselves are named."""
    checkpoint, graph = exported("qwen2")
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--someone--tiny"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (home / folder).mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for i, file in enumerate(checkpoint.folder.iterdir()):
        shutil.copyfile(file, home / "blobs" / f"blob{i}")
        (home / "snapshots" / commit / file.name).symlink_to(f"../../blobs/blob{i}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text("model: someone/tiny\npasses: [{quantize_matmul: {bits: 4}}]")
    found = resolve(load_recipe(path), None, download=False)
    assert (found.source, found.revision) == ("someone/tiny", commit)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and tensor.name in found.weights:
            tensor._values = found.weights[tensor.name]
    session = open_reference(graph)
    assert session.run(["logits"], decoder_feeds(graph, np.ones((1, 4), np.int64)))[0].shape == (1, 4, 320)


def test_weights_that_do_not_fit_the_config(exported: Exported, tiny: Callable[..., Path]) -> None:
    _, graph = exported("qwen2")
    other = open_checkpoint(tiny("qwen2", intermediate_size=96), "x")
    fresh = graph.copy()
    # as exported: weights are inputs again
    fresh.inputs = [gs.Variable("model.layers.0.mlp.up_proj.weight", np.float32, [128, 64])]
    with pytest.raises(
        ExportError, match=r"'model.layers.0.mlp.up_proj.weight' has the shape \[96, 64\], config.json describes"
    ):
        bind(fresh, other)
    fresh.inputs = [gs.Variable("model.layers.9.mlp.up_proj.weight", np.float32, [128, 64])]
    with pytest.raises(ExportError, match=r"no tensor 'model.layers.9.mlp.up_proj.weight'.*A shard is missing"):
        bind(fresh, other)


def test_a_loaded_graph_holds_no_weight_in_memory(exported: Exported) -> None:
    _checkpoint, graph = exported("qwen2")
    held = sum(
        t.values.nbytes
        for t in graph.tensors().values()
        if type(t).__name__ == "Constant" and isinstance(t._values, np.ndarray)
    )
    assert held < 1000
