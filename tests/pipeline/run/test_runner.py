"""The demos as a user runs them, and everything that can get in their way."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowbit.passes.base import PassError
from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.commands.plan import make_plan, plan_tables
from lowbit.pipeline.errors import CheckpointError, PipelineError, ValidationFailed
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.runtime import memory
from lowbit.pipeline.store.store import Draft, Store
from tests.conftest import PYDOCS
from tests.running import know_export, run_in_process
from tests.sharing import once
from tests.tiny import recipe_text

ROOT = Path(__file__).parents[3]
QUIET = Console(quiet=True)
FOUR = "quantize_matmul: {bits: 4, block_size: 32}"

CONTINUE = """
import sys
import MNN.llm as llm
model = llm.create(sys.argv[1]); model.load()
print("RESULT" + repr(model.response(sys.argv[2], False)))
"""


@pytest.fixture(scope="session")
def build(shared: Path) -> Path:
    """Where the demos lie that `demo` has made."""
    return shared / "demos"


@pytest.fixture(scope="session")
def demo(build: Path) -> Callable[[int], str]:
    """Runs a demo as a user does, once; returns what it printed."""

    def make(bits: int) -> str:
        def command(log: Path) -> None:
            done = lowbit("run", f"demo-q{bits}", "--build", build)
            assert done.returncode == 0, done.stderr
            log.write_text(done.stdout, "utf-8")

        return once(build / f"demo-q{bits}.log", command).read_text("utf-8")

    return make


def lowbit(*arguments: object, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowbit", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, **options)


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    return found


def recipe(folder: Path, *passes: str, name: str = "mine", **options: str) -> Recipe:
    path = folder / f"{name}.yaml"
    path.write_text(recipe_text(PYDOCS, *passes, **options), "utf-8")
    return load_recipe(path)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("bits", "kl"), [pytest.param(4, 0.02, marks=SLOW), (3, 0.04), pytest.param(2, 0.16, marks=SLOW)])
def test_the_demos(build: Path, demo: Callable[[int], str], bits: int, kl: float) -> None:
    printed = demo(bits)
    for word in ("bits per weight", "perplexity", "KL divergence", "equal bit for bit", str(build / f"demo-q{bits}" / "mnn")):
        assert word in printed
    folder = build / f"demo-q{bits}"
    found = manifest(folder)
    assert found["hand_offs"]["mnn"]["bit_exact"] is True
    assert found["hand_offs"]["mnn"]["weights_checked"] == 5_767_168
    assert found["hand_offs"]["mnn"]["max_relative_error"] < 1e-4
    assert 0 < found["quality"]["onnxruntime"]["kl_divergence"] < kl
    assert found["quality"]["onnxruntime"]["reference_perplexity"] == pytest.approx(74.15, abs=0.01)
    text = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(folder / "mnn" / "config.json"), "The following example"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert len(text.split("RESULT")[1]) > 50
    assert check_folder(folder)["weights"] == 5_767_168


def test_three_bits_are_three_bits(build: Path, demo: Callable[[int], str]) -> None:
    """The data file of demo-q3 is within 1% of 3-bit codes, 4-bit lm_head, scales and zero points, and float tables."""
    demo(3)
    folder = build / "demo-q3"
    weights = manifest(folder)["weights"]
    expected = sum(w["shape"][0] * w["shape"][1] * w["bits_per_weight"] / 8 for w in weights.values())
    three = weights["model.layers.0.mlp.down_proj"]
    assert (three["bits"], three["bits_per_weight"]) == (3, 3 + 16 / 64 + 4 / 64)
    kept = 2 * (4096 * 256 + 13 * 256 + 6 * 512)
    assert (folder / "onnx" / "model.onnx.data").stat().st_size == pytest.approx(expected + kept, rel=0.01)


@pytest.mark.parametrize("bits", [pytest.param(4, marks=SLOW), 3, pytest.param(2, marks=SLOW)])
def test_the_plan_is_what_a_run_gives(build: Path, demo: Callable[[int], str], tmp_path: Path, bits: int) -> None:
    demo(bits)
    plan = make_plan(load_recipe(ROOT / "recipes" / f"demo-q{bits}.yaml"), build, None)
    found = manifest(build / f"demo-q{bits}")
    assert plan.bits_per_weight == pytest.approx(found["size"]["bits_per_weight"])
    data = (build / f"demo-q{bits}" / "onnx" / "model.onnx.data").stat().st_size
    weights = (build / f"demo-q{bits}" / "mnn" / "llm.mnn.weight").stat().st_size
    table = (build / f"demo-q{bits}" / "mnn" / "embeddings_bf16.bin").stat().st_size
    assert plan.onnx_bytes == pytest.approx(data, rel=0.005)
    assert plan.hand_off_bytes["mnn-llm"] == pytest.approx(weights + table, rel=0.005)
    assert all(one.cached for one in plan.weights)
    assert list(plan.steps) == [step["name"] for step in found["steps"]]
    assert len(plan_tables(plan)) == 2
    fresh = make_plan(plan.recipe, tmp_path, None)
    assert 0 < plan.seconds < fresh.seconds, "what is known takes less time ..."
    assert plan.disk_bytes < fresh.disk_bytes, "... and less disk"


def test_a_plan_leaves_out_passes_that_change_values_alone(tmp_path: Path) -> None:
    passes = ("rotate_residual", "narrow_embedding: {dtype: bf16}", "quantize_matmul: {bits: 3}", "fold_channel_scales")
    plan = make_plan(recipe(tmp_path, *passes, convert="calibrate: {windows: 1}"), tmp_path, None)
    assert len(plan.weights) == 43


def test_a_second_run_recalls_and_one_change_runs_what_depends_on_it(tmp_path: Path) -> None:
    steps = (
        "narrow_embedding",
        "quantize_matmul: {bits: 4, block_size: 64, include: ['*.down_proj']}",
        "quantize_matmul: {bits: 3, block_size: 64}",
    )
    first = run_in_process(recipe(tmp_path, *steps, convert=""), tmp_path / "build")
    before = manifest(first)
    made = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "build" / ".store").rglob("codes")}
    again = manifest(run_in_process(recipe(tmp_path, *steps, convert=""), tmp_path / "build"))
    assert [s["name"] for s in again["steps"] if s["cached"]] == ["export", "write onnx"]
    different = {name for name in before["files"] if again["files"][name] != before["files"][name]}
    assert different <= {"report.html"}, "it tells how long the steps took; all else is the same"
    changed = (steps[0], steps[1].replace("bits: 4", "bits: 2"), steps[2])
    after = manifest(run_in_process(recipe(tmp_path, *changed, convert=""), tmp_path / "build"))
    new = {p.parent.name for p in (tmp_path / "build" / ".store").rglob("codes")} - set(made)
    assert len(new) == 6, "six down_proj, and nothing else"
    assert next(s["notes"] for s in after["steps"] if s["name"] == "write onnx") == ["6 weights quantized, 37 recalled"]
    same = [n for n, w in after["weights"].items() if w["codes_sha256"] == before["weights"][n]["codes_sha256"]]
    assert len(same) == 43 - 6
    assert {
        p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "build" / ".store").rglob("codes") if p.parent.name in made
    } == made


def test_the_manifest_has_everything(build: Path, demo: Callable[[int], str]) -> None:
    demo(3)
    found = manifest(build / "demo-q3")
    tensors = {name: sha for shard in found["model"]["shards"].values() for name, sha in shard.items()}
    assert all(w["source_sha256"] in tensors.values() for w in found["weights"].values())
    assert tensors.keys() == open_checkpoint(ROOT / "tests" / "models" / "qwen2-pydocs", "").weights.keys()
    assert set(found) == {
        "recipe", "model", "versions", "steps", "weights", "size", "quality", "hand_offs", "files", "gates", "model_type",
        "recipe_text", "seal", "version",
    }  # fmt: skip
    assert set(found["steps"][0]) >= {"name", "options", "key", "cached", "seconds", "peak_rss_bytes", "rewritten", "skipped"}
    weight = found["weights"]["lm_head"]
    assert set(weight) >= {"shape", "bits", "block_size", "symmetric", "method", "mse", "codes_sha256"}
    tokenizer = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    mnn = ("config.json", "embeddings_bf16.bin", "llm.mnn", "llm.mnn.weight", "llm_config.json", "tokenizer.mtok")
    onnx = ("model.onnx", "model.onnx.data", *tokenizer)
    pages = ("recipe.yaml", "report.html", "README.md")
    assert set(found["files"]) == {*pages, *(f"onnx/{n}" for n in onnx), *(f"mnn/{n}" for n in mnn)}
    assert not list((build / "demo-q3").glob(".work-*"))


def test_a_missed_gate_fails_and_keeps_the_results(tmp_path: Path, store: Store) -> None:
    gates = "validate: {windows: 1, window: 64, max_kl_divergence: 1.0e-6, max_perplexity_ratio: 2.0}"
    with pytest.raises(ValidationFailed, match=r"gate missed: max_kl_divergence: 0\.\d+, allowed 1e-06\. All results are kept"):
        run_in_process(recipe(tmp_path, FOUR, validate=gates, convert=""), tmp_path / "build", store)
    assert check_folder(tmp_path / "build" / "mine")["files"] > 5


def test_own_text(tmp_path: Path, store: Store) -> None:
    (tmp_path / "mine.txt").write_text("The quick brown fox. " * 200)
    options = {"validate": "validate: {text: mine.txt, windows: 2, window: 64}", "convert": ""}
    found = manifest(run_in_process(recipe(tmp_path, FOUR, **options), tmp_path / "build", store))
    assert found["quality"]["onnxruntime"]["tokens"] == 2 * 63
    for text, message in (
        ("text: none.txt", "cannot be read as UTF-8"),
        ("text: mine.txt, window: 30000", "less than one window"),
    ):
        with pytest.raises(PipelineError, match=message):
            run_in_process(recipe(tmp_path, FOUR, validate=f"validate: {{{text}}}", convert=""), tmp_path / "build", store)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (("quantize_matmul: {bits: 4, include: ['*.q_prj']}",), "the closest real names: 'model.layers.0.self_attn.q_proj'"),
        (("narrow_embedding",), "this recipe quantizes nothing"),
        (("narrow_embedding: {dtype: bf16}",), "quantizes nothing"),
    ],
)
def test_recipes_that_do_nothing(tmp_path: Path, passes: tuple[str, ...], message: str) -> None:
    with pytest.raises((PassError, PipelineError), match=f"(?i){message}"):
        run_in_process(recipe(tmp_path, *passes), tmp_path / "build")


def test_a_failed_run_loses_nothing_that_was_there(tmp_path: Path, store: Store) -> None:
    folder = run_in_process(recipe(tmp_path, FOUR, convert=""), tmp_path / "build", store)
    before = manifest(folder)["files"]
    with pytest.raises(PassError) as error:
        run_in_process(recipe(tmp_path, "quantize_matmul: {bits: 4, include: [nothing]}"), tmp_path / "build", store)
    assert error.value.__notes__ == [f"in quantize_matmul, {tmp_path / 'mine.yaml'}:3:5"]
    assert manifest(folder)["files"] == before
    assert check_folder(folder)["files"] == len(before)


def test_a_disk_too_small_is_said_before_the_start(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(PipelineError, match=r"this run needs 1\d\.\d\d MB of disk, \d\.\d\d MB are free"):
        run_in_process(recipe(tmp_path, "narrow_embedding", FOUR), small_disk / "build")
    assert not list((small_disk / "build" / ".store").glob("*/*/codes"))


@dataclass(frozen=True)
class Filled(Store):
    """A store beside which another program leaves 4 MB of the disk, as soon as an entry is begun."""

    def begin(self, write: Callable[[Path], dict[str, Any]]) -> Draft:
        with (self.root.parent / "ballast").open("ab") as ballast:
            ballast.write(bytes(max(0, shutil.disk_usage(self.root).free - (4 << 20))))
        return super().begin(write)


def test_a_disk_that_fills_up_during_a_run(tmp_path: Path, small_disk: Path) -> None:
    """4 MB hold the codes but not the result; with a larger disk the run goes on from what was kept."""
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    mine, build = recipe(tmp_path, "narrow_embedding", FOUR), small_disk / "build"
    know_export(mine, Store(build / ".store"))
    with pytest.raises(PipelineError, match="the disk is full. What was finished is kept"):
        run_in_process(mine, build, Filled(build / ".store"))
    assert not list((build / "mine").glob(".work-*"))
    assert not (build / "mine" / "manifest.json").exists()
    (build / "ballast").unlink()
    again = manifest(run_in_process(mine, build))
    assert next(s["name"] for s in again["steps"] if s["cached"]) == "export"
    assert check_folder(build / "mine")["weights"] == 5_767_168


def damaged(tmp_path: Path) -> Path:
    return shutil.copytree(PYDOCS, tmp_path / "model")


def test_bad_checkpoints(tmp_path: Path, store: Store) -> None:
    model = damaged(tmp_path)
    mine = recipe(tmp_path, "narrow_embedding", FOUR)

    def run_on(folder: Path) -> None:
        run_in_process(mine, tmp_path / "build", store, folder)

    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        run_on(tmp_path / "none")
    (model / "tokenizer.json").rename(model / "kept.json")
    with pytest.raises(PipelineError, match=r"no tokenizer.json"):
        run_on(model)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        run_on(model)
    (model / "kept.json").replace(model / "tokenizer.json")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    tensors = open_checkpoint(PYDOCS, "x").weights
    for name, message in (
        ("model.layers.3.mlp.up_proj.weight", r"model.layers.3.mlp.up_proj: weight \[0, 0\] is inf"),
        ("model.norm.weight", "'model.norm.weight': a weight from row 0 on is NaN or infinite"),
    ):
        data = bytearray(whole)
        offset = tensors[name].offset
        data[offset : offset + 2] = b"\x80\x7f"  # infinity in bf16
        weights.write_bytes(bytes(data))
        with pytest.raises((PassError, PipelineError), match=message):
            run_on(model)
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        run_on(model)


def test_a_model_too_large_for_memory_is_validated_all_the_same(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_needed", lambda checkpoint: 1 << 60)
    options = {"validate": "validate: {windows: 1, window: 64}"}
    found = manifest(run_in_process(recipe(tmp_path, "narrow_embedding", FOUR, **options), tmp_path / "build", store))
    assert found["hand_offs"]["mnn"]["bit_exact"] is True
    assert found["hand_offs"]["mnn"]["lowering_relative_error"] < 1e-5
    assert 0 < found["quality"]["onnxruntime"]["kl_divergence"] < 0.1, "validated block by block all the same"
    assert found["quality"]["mnn"]["skipped"].startswith("the weights in float need 1152921504.6 GB of memory")


def test_two_runs_at_once_and_an_interrupt(tmp_path: Path) -> None:
    """The second run is told; Ctrl-C ends the first with a sentence, and a third goes on."""
    recipe(tmp_path, "narrow_embedding", FOUR, validate="validate: {windows: 60}")
    command = [sys.executable, "-m", "lowbit", "run", str(tmp_path / "mine.yaml"), "--build", str(tmp_path / "build")]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lock = tmp_path / "build" / "mine" / ".lock"
    deadline = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"another run (process {first.pid} on {platform.node()}) is working here" in second.stderr
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert "stopped. What was finished is kept" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "build" / "mine" / "manifest.json").exists()
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace("windows: 60", "windows: 1"))
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr


def test_check_names_what_changed(tmp_path: Path, store: Store) -> None:
    folder = run_in_process(recipe(tmp_path, "narrow_embedding", FOUR), tmp_path / "build", store)
    path = folder / "mnn" / "llm.mnn.weight"
    data = bytearray(path.read_bytes())
    data[100_000] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(
        PipelineError, match=r"changed since the run \(model.layers.\d.*: the code of weight \[\d+, \d+\] differs"
    ):
        check_folder(folder)
    path.unlink()
    with pytest.raises(PipelineError, match=r"llm.mnn.weight: missing. Run the recipe again"):
        check_folder(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(PipelineError, match="it is not a manifest"):
        check_folder(folder)
    with pytest.raises(PipelineError, match="no run has finished here"):
        check_folder(tmp_path)


def test_the_command_line(tmp_path: Path) -> None:
    unknown = lowbit("run", "demo-q33")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: recipes/demo-q33.yaml: no such recipe. Did you mean 'demo-q3'?\n"
    option = lowbit("run", "demo-q3", "--modle", "x")
    assert option.returncode == 2
    assert "--model" in option.stderr
    planned = lowbit("plan", "demo-q3", "--build", tmp_path / "none")
    assert planned.returncode == 0
    assert "bits per weight" in planned.stdout
    assert not (tmp_path / "none").exists(), "a plan touches nothing"
    assert lowbit("check", tmp_path).stderr.startswith(f"error: {tmp_path}: no manifest.json")
    schema = json.loads(lowbit("schema").stdout)
    assert schema == json.loads((ROOT / "recipes" / "schema.json").read_text("utf-8"))
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert "cannot write here" in lowbit("run", "demo-q3", "--build", locked / "build").stderr
    (tmp_path / "file").write_text("in the way")
    assert "cannot write here" in lowbit("run", "demo-q3", "--build", tmp_path / "file" / "build").stderr


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_flagship_plans_on_its_true_shape(tmp_path: Path, bits: int, flagship: Callable[[], Path]) -> None:
    """Headers of the true 7B shape over a sparse file: sizes without reading a weight."""
    found = make_plan(load_recipe(ROOT / "recipes" / f"deepseek-r1-7b-q{bits}.yaml"), tmp_path, flagship())
    assert len(found.weights) == 197
    assert found.source_bytes == pytest.approx(15.23e9, rel=0.001)
    assert found.disk_bytes < 2.2 * (found.onnx_bytes + found.hand_off_bytes["mnn-llm"])
    assert found.memory_bytes < 4e9
    expected = {4: 4 + 16 / 128 + 4 / 128, 3: 3 + 32 / 64, 2: 2 + 32 / 32}[bits]
    assert found.bits_per_weight == pytest.approx(expected, rel=0.09)


def test_a_plan_does_not_import_torch(tmp_path: Path, flagship: Callable[[], Path]) -> None:
    recipe = ROOT / "recipes" / "deepseek-r1-7b-q3.yaml"
    script = (
        "import sys; from pathlib import Path; from lowbit.pipeline.commands.plan import make_plan\n"
        "from lowbit.pipeline.recipe.load import load_recipe\n"
        f"make_plan(load_recipe(Path({str(recipe)!r})), Path({str(tmp_path)!r}), Path({str(flagship())!r}))\n"
        "print(*{'torch', 'transformers', 'MNN'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr
