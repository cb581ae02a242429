"""Codes of another layer, wherever they come from, are noticed; what is wrong leaves the store and is made anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import HashedWeight, SourceDigests
from tests.running import run_in_process
from tests.tiny import recipe_text

Q = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
RTN = "quantize_matmul: {bits: 4, block_size: 32}"
GPTQ = "quantize_matmul: {bits: 2, block_size: 32, method: gptq}"
READING = "calibrate: {{windows: 2, window: 32, text: {text}}}"


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text("utf-8"))


def files(folder: Path) -> dict[str, str]:
    return {name: sha for name, sha in manifest(folder)["files"].items() if name != "report.html"}


def entry_of(store: Store, sha256: str) -> Entry:
    """The newest entry of a weight by the hash of its codes: training makes one after the other."""
    records = [record for record in store.root.glob("*/*/entry.json") if sha256 in record.read_text("utf-8")]
    entry = store.get(max(records, key=lambda record: record.stat().st_mtime_ns).parent.name)
    assert entry is not None
    return entry


def swap(store: Store, folder: Path, names: tuple[str, str]) -> None:
    """Let two whole entries of a store be each other's, sealed as if that were right."""
    both = [entry_of(store, manifest(folder)["weights"][name]["codes_sha256"]) for name in names]
    copies = [shutil.copytree(entry.folder, folder / entry.folder.name) for entry in both]
    for entry, other, copy in zip(both, reversed(both), reversed(copies), strict=True):
        store.remove(entry)

        def write(work: Path, files: Path = copy, facts: dict[str, Any] = other.facts) -> dict[str, Any]:
            for file in files.iterdir():
                if file.name != "entry.json":
                    shutil.copy(file, work)
            return facts

        store.put(entry.folder.name, write)


@pytest.mark.parametrize(
    ("passes", "convert", "said"),
    [
        ((RTN,), "", "rtn gives other codes for rows 0 to 63"),
        (("rotate_residual", RTN.replace("4,", "3, method: hqq, ")), "", "hqq gives other codes"),
        ((GPTQ,), READING, "their relative error is 1."),
        ((GPTQ, "finetune_blocks: {epochs: 1}"), READING, "their relative error is 1."),
    ],
    ids=["rtn", "rotated", "gptq", "trained"],
)
def test_codes_of_another_layer_are_refused(
    tiny: Callable[..., Path], text: Path, tmp_path: Path, passes: tuple[str, ...], convert: str, said: str
) -> None:
    recipe, store = tmp_path / "mine.yaml", Store(tmp_path / "build" / ".store")
    recipe.write_text(recipe_text(tiny("llama"), *passes, convert=convert.format(text=text)), "utf-8")
    folder = run_in_process(load_recipe(recipe), tmp_path / "build")
    before = files(folder)
    swap(store, folder, Q)
    with pytest.raises(PipelineError) as error:
        run_in_process(load_recipe(recipe), tmp_path / "build")
    assert str(error.value).startswith(f"{Q[0]}: its codes are not those of the checkpoint ({said}")
    assert f"nor are those of 1 others. They came from {store.root} and were removed there. Run" in str(error.value)
    assert files(folder) == before, "the good result stays"
    assert files(run_in_process(load_recipe(recipe), tmp_path / "build")) == before


def test_a_wrong_digest_of_a_tensor_does_not_outlive_the_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Two tensors whose digests are each other's, and sealed: either layer recalls the other's codes."""
    recipe, store = tmp_path / "mine.yaml", Store(tmp_path / "build" / ".store")
    recipe.write_text(recipe_text(tiny("llama"), RTN, convert=""), "utf-8")
    before = files(run_in_process(load_recipe(recipe), tmp_path / "build"))
    sources, weights = SourceDigests(store), open_checkpoint(tiny("llama"), "").weights
    tensors = [weights[f"{name}.weight"] for name in Q]
    for tensor, other in zip(tensors, reversed(tensors), strict=True):
        hashed, wrong = HashedWeight(tensor), HashedWeight(other)
        assert list(wrong.chunks())
        hashed.sha = wrong.sha
        sources.remember(hashed)
    with pytest.raises(PipelineError, match="its codes are not those of the checkpoint"):
        run_in_process(load_recipe(recipe), tmp_path / "build")
    assert files(run_in_process(load_recipe(recipe), tmp_path / "build")) == before
