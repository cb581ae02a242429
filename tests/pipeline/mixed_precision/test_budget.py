"""Budgets: never exceeded, spent in the best way, and what is said when they cannot be met."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lowbit.passes.allocate_bits import AllocateBits
from lowbit.passes.base import PassError
from lowbit.passes.quant.format import BlockFormat
from lowbit.pipeline.commands.plan import make_plan, plan_tables
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.mixed_precision.device_times import device_times
from lowbit.pipeline.mixed_precision.problem import Problem
from lowbit.pipeline.mixed_precision.solver import Costs, solve
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.store import Store
from tests.conftest import PYDOCS
from tests.graphs import graph, random
from tests.running import run_in_process
from tests.tiny import recipe_text, write_sparse_flagship

FORMS = [BlockFormat(bits, 32, False, "fp16") for bits in (2, 3, 4)]
QUIET = Console(quiet=True)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.lists(st.floats(0, 10), min_size=3, max_size=3)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_the_choice_is_the_best_of_all_that_fit(weights: list[tuple[int, list[float]]], share: float) -> None:
    sizes = {(f"w{i}", form): count * form.bits for i, (count, _) in enumerate(weights) for form in FORMS}
    sensitivities = {(f"w{i}", form): d for i, (_, losses) in enumerate(weights) for form, d in zip(FORMS, losses, strict=True)}
    least = sum(min(sizes[f"w{i}", form] for form in FORMS) for i in range(len(weights)))
    most = sum(max(sizes[f"w{i}", form] for form in FORMS) for i in range(len(weights)))
    budget = int(least + share * (most - least))
    found = solve(Costs(sensitivities, sizes), budget)
    assert found.size == sum(sizes[name, form] for name, form in found.chosen.items()) <= budget
    every = itertools.product(FORMS, repeat=len(weights))
    fitting = [one for one in every if sum(sizes[f"w{i}", form] for i, form in enumerate(one)) <= budget]
    best = min(sum(sensitivities[f"w{i}", form] for i, form in enumerate(one)) for one in fitting)
    assert found.expected_loss == pytest.approx(best, rel=1e-5, abs=1e-6)


def test_a_budget_below_the_smallest_is_refused() -> None:
    sizes: dict[tuple[str, BlockFormat], int] = {("w", form): 100 * form.bits for form in FORMS}
    with pytest.raises(PipelineError, match="the smallest choices take 200 bytes, 199 are left"):
        solve(Costs(dict.fromkeys(sizes, 1.0), sizes), 199)


def test_hundreds_of_weights_take_seconds_at_most() -> None:
    """The shape of 7B: 197 weights, a dozen choices each."""
    generator = np.random.default_rng(0)
    forms = [BlockFormat(bits, size, False, "fp16") for bits in (2, 3, 4, 8) for size in (32, 64, 128)]
    names = [f"w{i}" for i in range(197)]
    sizes = {
        (n, f): int(s * (f.bits + 32 / f.block_size))
        for n, s in zip(names, generator.integers(1, 70, 197) * 10**6, strict=True)
        for f in forms
    }
    sensitivities = {
        (n, f): float(d * 4.0**-f.bits * f.block_size**0.3)
        for n, d in zip(names, generator.lognormal(0, 1, 197), strict=True)
        for f in forms
    }
    budget = sum(sizes[n, forms[4]] for n in names)
    found = solve(Costs(sensitivities, sizes), budget)
    assert found.size <= budget
    assert found.size > 0.999 * budget
    assert found.gap < 1e-3


def test_time_is_a_second_budget() -> None:
    sizes = {("w", form): 100 * form.bits for form in FORMS}
    sensitivities = {("w", form): 1.0 / form.bits for form in FORMS}
    times = {("w", form): {2: 0.9, 3: 1.7, 4: 1.0}[form.bits] for form in FORMS}
    assert solve(Costs(sensitivities, sizes), 350).chosen["w"].bits == 3
    found = solve(Costs(sensitivities, sizes, times), 350, longest=1.0)
    assert (found.chosen["w"].bits, found.time) == (2, 0.9)
    with pytest.raises(PipelineError, match=r"the fastest choices take 0\.900 of the time of 4 bits, 0\.5 are allowed"):
        solve(Costs(sensitivities, sizes, times), 350, longest=0.5)
    with pytest.raises(PipelineError, match="no choices that are as fast as max_relative_time: 0.95 asks for fit"):
        slow = times | {("w", FORMS[0]): 1.0, ("w", FORMS[2]): 0.9}
        solve(Costs(sensitivities, sizes, slow), 350, longest=0.95)


Spend = Callable[..., Path]


@pytest.fixture
def spend(tmp_path: Path, store: Store, validate: str) -> Spend:
    """Runs a recipe with a budget; what other tests have made or measured is recalled."""

    def run(model: Path, options: str, convert: str = "convert: {}", name: str = "mine", store: Store = store) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            recipe_text(model, "narrow_embedding", f"allocate_bits: {options}", convert=convert, validate=validate), "utf-8"
        )
        return run_in_process(load_recipe(path), tmp_path / "build", store)

    return run


def forms_of(folder: Path) -> dict[str, tuple[int, int]]:
    weights = json.loads((folder / "manifest.json").read_text("utf-8"))["weights"]
    return {name: (one["bits"], one["block_size"]) for name, one in weights.items()}


@pytest.mark.parametrize("sensitivity", ["kl", "fisher", "output_mse", "weight_mse"])
def test_bits_are_spent_where_they_matter(tiny: Callable[..., Path], spend: Spend, sensitivity: str) -> None:
    options = f"{{bits_per_weight: 4, block_sizes: [32], sensitivity: {sensitivity}, method: mse}}"
    folder = spend(tiny("llama"), options, convert="")
    found = forms_of(folder)
    assert len({bits for bits, _ in found.values()}) > 1
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    notes = next(step["notes"] for step in manifest["steps"] if step["name"] == "allocate_bits")
    assert notes[0].startswith("15 weights in 0.0")
    assert "0.0% above the least possible" in notes[2]


def test_the_resolved_recipe_makes_the_same_bytes(
    tiny: Callable[..., Path], tmp_path: Path, store: Store, spend: Spend
) -> None:
    folder = spend(tiny("llama"), "{bits_per_weight: 4, block_sizes: [32, 64], sensitivity: weight_mse}")
    again = run_in_process(load_recipe(folder / "resolved.yaml"), tmp_path / "other", store)
    first, second = (json.loads((one / "manifest.json").read_text())["files"] for one in (folder, again))
    assert [first[name] for name in first if name.startswith(("onnx", "mnn"))] == [
        second[name] for name in second if name.startswith(("onnx", "mnn"))
    ]


@pytest.mark.parametrize("sensitivity", ["kl", "weight_mse"])
def test_what_other_passes_take_is_left_to_them(
    tiny: Callable[..., Path], tmp_path: Path, store: Store, sensitivity: str
) -> None:
    budget = f"allocate_bits: {{bits_per_weight: 4, block_sizes: [32], sensitivity: {sensitivity}, exclude: ['*.o_proj']}}"
    entries = (
        "quantize_matmul: {bits: 8, block_size: 64, include: [lm_head]}",
        budget,
        "quantize_matmul: {bits: 4, block_size: 16}",
    )
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text(tiny("llama"), "narrow_embedding", *entries), "utf-8")
    found = forms_of(run_in_process(load_recipe(path), tmp_path / "build", store))
    assert found["lm_head"] == (8, 64)
    assert {found[f"model.layers.{i}.self_attn.o_proj"] for i in range(2)} == {(4, 16)}
    assert {size for name, (_, size) in found.items() if name != "lm_head" and not name.endswith("o_proj")} == {32}


def test_groups_share_their_choice(tiny: Callable[..., Path], spend: Spend) -> None:
    groups = "[[q_proj, k_proj, v_proj], [gate_proj, up_proj]]"
    options = f"{{bits_per_weight: 4.2, block_sizes: [32], sensitivity: weight_mse, groups: {groups}}}"
    found = forms_of(spend(tiny("llama"), options, convert=""))
    for i in range(2):
        assert len({found[f"model.layers.{i}.self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert len({found[f"model.layers.{i}.mlp.{part}_proj"] for part in ("gate", "up")}) == 1


@pytest.mark.parametrize(
    ("convert", "folder"), [("convert: {}", "mnn"), ("convert: {target: onnxruntime-genai}", "genai"), ("", "onnx")]
)
def test_a_folder_fits(tiny: Callable[..., Path], spend: Spend, convert: str, folder: str) -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=768, num_hidden_layers=2)
    options = "{{fit: {fit}, block_sizes: [64], sensitivity: weight_mse}}"
    made = spend(model, options.format(fit="1.25MB"), convert)
    size = sum(file.stat().st_size for file in (made / folder).iterdir())
    assert 0.75 * 1.25e6 < size <= 1.25e6
    with pytest.raises(
        PipelineError, match=r"fit: 0.1MB cannot be met: .* The least is \d\.\d\d MB: all weights at 2 bits in blocks of 64"
    ):
        spend(model, options.format(fit="0.1MB"), convert)


def test_a_second_budget_measures_nothing(
    tiny: Callable[..., Path], tmp_path: Path, spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Store(tmp_path / "store")
    spend(tiny("llama"), "{bits_per_weight: 4, block_sizes: [32], bits: [2, 4]}", convert="", store=own)

    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("lowbit.pipeline.mixed_precision.sensitivity_kl.open_reference", fail)
    spend(tiny("llama"), "{bits_per_weight: 4.5, block_sizes: [32], bits: [2, 4]}", convert="", name="other", store=own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{}", "give either fit: 3.2GB or bits_per_weight: 3.25"),
        ("{fit: 3GB, bits_per_weight: 3}", "give either fit: 3.2GB or bits_per_weight: 3.25"),
        ("{bits_per_weight: 3, target: phone}", "target and max_relative_time belong together"),
        ("{bits_per_weight: 12}", "bits_per_weight: 12 is more than 8 bits with their scales"),
        ("{fit: 3 bananas}", "fit is '3 bananas'"),
        ("{fit: 3GB, zero_point: float}", "zero_point: float goes with bits of 2, 3 and 4"),
        ("{bits_per_weight: 3, bits: [5]}", "expected 2, 3, 4 or 8"),
    ],
)
def test_budgets_that_say_nothing(tmp_path: Path, options: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text("./x", f"allocate_bits: {options}"), "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_what_cannot_be_measured_is_said(tiny: Callable[..., Path], spend: Spend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lowbit.pipeline.mixed_precision.measure.too_large", lambda checkpoint: "the weights in float need 45.7 GB of memory"
    )
    with pytest.raises(
        PipelineError, match="sensitivity: kl is not possible, the weights in float need 45.7 GB .* Set sensitivity: fisher"
    ):
        spend(tiny("llama"), "{bits_per_weight: 4}")
    with pytest.raises(PassError, match="allocate_bits becomes quantize_matmul before any pass is applied"):
        text = "g (float[2, 32] x) => (float[2, 8] y) { y = MatMul (x, a__weight) }"
        AllocateBits(bits_per_weight=3).apply(graph(text, a__weight=random(32, 8)))


def test_a_silly_budget_is_said(tiny: Callable[..., Path], spend: Spend) -> None:
    with pytest.raises(PipelineError, match=r"fit: 3GB is \d+\.\d bits for each weight; at 8 bits .* takes 0\.\d\d MB"):
        spend(tiny("llama"), "{fit: 3GB, sensitivity: weight_mse}")


def test_speed_counts(tiny: Callable[..., Path], tmp_path: Path, spend: Spend) -> None:
    (tmp_path / "targets").mkdir()
    shutil.copy("recipes/targets/snapdragon-8-elite.yaml", tmp_path / "targets")
    options = "bits_per_weight: 4, block_sizes: [32], bits: [2, 3, 4], sensitivity: weight_mse"
    slow = forms_of(spend(tiny("llama"), f"{{{options}}}"))
    folder = spend(tiny("llama"), f"{{{options}, target: snapdragon-8-elite, max_relative_time: 1.0}}", name="fast")
    assert 3 in {bits for bits, _ in slow.values()}
    assert {bits for bits, _ in forms_of(folder).values()} == {2, 4}
    notes = json.loads((folder / "manifest.json").read_text("utf-8"))["steps"]
    assert any("of the time that 4 bits take on snapdragon-8-elite" in note for step in notes for note in step["notes"])
    with pytest.raises(PipelineError, match=r"phone\.yaml: no such table of times. Known: snapdragon-8-elite"):
        spend(tiny("llama"), f"{{{options}, target: phone, max_relative_time: 1.0}}")
    (tmp_path / "targets" / "odd.yaml").write_text("device: odd\n")
    with pytest.raises(PipelineError, match=r"odd\.yaml: no table of times"):
        spend(tiny("llama"), f"{{{options}, target: odd, max_relative_time: 1.0}}")
    five = (tmp_path / "targets" / "snapdragon-8-elite.yaml").read_text().replace("3: 1368, ", "")
    (tmp_path / "targets" / "five.yaml").write_text(five)
    with pytest.raises(PipelineError, match="nobody measured 3 bits there, only 2, 4, 8. Leave 3 out of bits"):
        spend(tiny("llama"), f"{{{options}, target: five, max_relative_time: 1.0}}")


def test_every_table_of_times_is_whole() -> None:
    files = sorted(Path("recipes/targets").glob("*.yaml"))
    assert files
    for file in files:
        assert device_times(file.stem, Path("recipes")).relative((2, 3, 4, 8))[4] == 1


def test_a_plan_shows_what_was_measured(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    entry = "allocate_bits: {bits_per_weight: 4, block_sizes: [32], sensitivity: kl}"
    path.write_text(recipe_text(tiny("llama"), "narrow_embedding", entry), "utf-8")
    with pytest.raises(PipelineError, match="what each weight costs was not measured yet"):
        make_plan(load_recipe(path), tmp_path / "build", None)
    found = forms_of(run_in_process(load_recipe(path), tmp_path / "build"))
    plan = make_plan(load_recipe(path), tmp_path / "build", None)
    planned = {one.weight.name: (one.weight.form.bits, one.weight.form.block_size) for one in plan.weights}
    assert planned == found
    assert all(one.cached for one in plan.weights)
    assert any((table.title or "").startswith("bits/block of every weight") for table in plan_tables(plan))


def test_the_flagship_fits_to_a_thousandth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the headers of the true shape; what the weights cost is made up, since they are zeros."""
    model = tmp_path / "model"
    write_sparse_flagship(model)
    shutil.copytree(PYDOCS, model, dirs_exist_ok=True, ignore=lambda _, names: {n for n in names if "tokenizer" not in n})

    def made_up(context: Any, problem: Problem) -> dict[tuple[str, BlockFormat], float]:
        rng = np.random.default_rng(0)
        scale = {one.name: float(rng.lognormal()) for one in problem.layers}
        return {(one.name, form): scale[one.name] * 4.0**-form.bits for one in problem.layers for form in problem.forms}

    monkeypatch.setattr("lowbit.pipeline.mixed_precision.allocate.recall_sensitivities", made_up)
    plan = make_plan(load_recipe(Path("recipes/deepseek-r1-7b-fit-3.2gb.yaml")), tmp_path / "build", model)
    assert 0.999 * 3.2e9 < plan.hand_off_bytes["mnn-llm"] <= 3.2e9
    fast = make_plan(load_recipe(Path("recipes/deepseek-r1-7b-fast-q3.yaml")), tmp_path / "build", model)
    weights = [(math.prod(one.weight.source.shape), one.weight.form.bits) for one in fast.weights]
    cost = device_times("snapdragon-8-elite", Path("recipes")).relative((2, 3, 4))
    assert sum(count * cost[bits] for count, bits in weights) <= sum(count for count, _ in weights)
