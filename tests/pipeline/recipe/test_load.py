"""Recipes: those that ship are right, and every mistake is named by file:line:column and what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lowbit import passes
from lowbit.passes.registry import names_in
from lowbit.pipeline.errors import RecipeError
from lowbit.pipeline.recipe.json_schema import recipe_schema
from lowbit.pipeline.recipe.load import find_recipe, load_recipe

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

RECIPE = """\
model: ./checkpoint
passes:
  - narrow_embedding
  - quantize_matmul:
      bits: 4
      include: [lm_head]
  - quantize_matmul:
      bits: 3
      block_size: 64
      method: mse
validate:
  windows: 20
convert:
  scale_dtype: fp16
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_explain_themselves(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.convert
    assert recipe.validate is not None
    quantized = [step for step in recipe.passes if step.name in ("quantize_matmul", "allocate_bits")]
    assert quantized
    assert recipe.text.count("#") >= 8, "a reader should be able to change it without the manual"


def test_the_recipes_of_the_readme_are_there() -> None:
    assert {p.stem for p in SHIPPED} >= {f"{model}-q{bits}" for model in ("demo", "deepseek-r1-7b") for bits in (4, 3, 2)}


def test_q4_is_mnn_s_defaults() -> None:
    recipe = load_recipe(ROOT / "recipes" / "deepseek-r1-7b-q4.yaml")
    options = [step.options for step in recipe.passes if step.name == "quantize_matmul"]
    assert {(o.bits, o.block_size, o.symmetric) for o in options} == {(4, 128, False)}  # type: ignore[attr-defined]


def test_the_schema_in_the_repository_is_current() -> None:
    kept = json.loads((ROOT / "recipes" / "schema.json").read_text("utf-8"))
    assert kept == recipe_schema(), "run `make schema`"
    assert set(names_in(passes)) <= {
        entry["const"] for entry in kept["properties"]["passes"]["items"]["anyOf"] if "const" in entry
    } | {"quantize_matmul", "quantize_embedding", "allocate_bits", "fuse_attention"}, "those have options that must be given"


def test_a_good_recipe_says_what_it_says(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, RECIPE))
    assert [step.name for step in recipe.passes] == ["narrow_embedding", "quantize_matmul", "quantize_matmul"]
    assert recipe.passes[2].options.model_dump(mode="json")["method"] == "mse"
    assert str(recipe.passes[2].position).endswith("mine.yaml:7:5")
    assert (
        load_recipe(write(tmp_path, RECIPE.replace("method: mse", "method: {hqq: {iterations: 5}}")))
        .passes[2]
        .options.method.iterations
        == 5
    )  # type: ignore[attr-defined]
    assert (
        load_recipe(
            write(tmp_path, RECIPE.replace("model: ./checkpoint", "model: {source: a/b, revision: abc}"))
        ).model.revision
        == "abc"
    )


MISTAKES = [
    ("bits: 3", "bits: 5", "8:13: bits is 5; expected 2, 3, 4 or 8."),
    ("bits: 3", 'bits: "3"', "8:13: bits is '3'; expected 2, 3, 4 or 8."),
    ("block_size: 64", "block_size: 24", "9:19: block_size is 24; expected 16, 32, 64, 128 or 256."),
    ("block_size", "blocksize", "9:7: unknown option 'blocksize'. Did you mean 'block_size'?"),
    ("block_size", "colour", "9:7: unknown option 'colour'. Options: bits, block_size,"),
    ("bits: 3", "bit: 3", "8:7: unknown option 'bit'. Did you mean 'bits'?"),
    ("      bits: 3\n", "", "8:7: the option 'bits' is required."),
    ("method: mse", "method: gtpq", "10:15: method: there is no method 'gtpq'. Did you mean 'gptq'?"),
    ("method: mse", "method: magic", "there is no method 'magic'. Known: awq, gptq, hqq, mse, refine, rtn, signround"),
    ("method: mse", "method: {hqq: {p: big}}", "method: hqq: p is 'big'; expected a valid number."),
    ("method: mse", "method: [mse]", "a method is a name such as rtn"),
    ("include: [lm_head]", "include: lm_head", "6:16: include is 'lm_head'; expected a list"),
    ("- narrow_embedding", "- narow_embedding", "3:5: there is no pass 'narow_embedding'. Did you mean 'narrow_embedding'?"),
    ("- narrow_embedding", "- 3", "3:5: an entry of passes is one name"),
    ("windows: 20", "windows: 0", "12:12: windows is 0; expected greater than or equal to 1."),
    ("windows: 20", "windows: no", "'no' means False in YAML. Write true or false"),
    ("windows: 20", "max_kl_divergence: 1e-3", "12:22: '1e-3' is text in YAML, not a number. Write 1.0e-3."),
    ("windows: 20", "windows: 020", "'020' is a number to base 60 or 8"),
    ("windows: 20", "windows: 20\n  windows: 30", "13:3: 'windows' is here twice; first in line 12. Remove one."),
    ("validate:", "validat:", "11:1: unknown section 'validat'. Did you mean 'validate'?"),
    ("scale_dtype: fp16", "target: coreml", "target is 'coreml'; expected 'mnn-llm', 'mnn' or 'onnxruntime-genai'."),
    ("scale_dtype: fp16", "target: mnn-lm", "14:11: target is 'mnn-lm'; expected 'mnn-llm', 'mnn' or 'onnxruntime-genai'. Did"),
    ("scale_dtype: fp16", "target: json.tool", "14:11: module 'json.tool' must define one target, it defines 0"),
    ("scale_dtype: fp16", "target: no.such", "14:11: there is no target module 'no.such': No module named 'no'"),
    ("scale_dtype: fp16", "target: [mnn]", "14:11: target is ['mnn']; expected 'mnn-llm', 'mnn' or 'onnxruntime-genai'."),
    (
        "scale_dtype: fp16",
        "three_bit: folded",
        "14:3: unknown option 'three_bit'. It is an option of target: onnxruntime-genai; this target has compare, scale_dtype.",
    ),
    (
        "scale_dtype: fp16",
        "target: onnxruntime-genai\n  scale_dtype: fp32",
        "15:3: unknown option 'scale_dtype'. It is an option of target: mnn-llm and mnn; this target has compare, three_bit.",
    ),
    ("convert:\n  scale_dtype: fp16", "convert: [{target: mnn}, {target: mnn}]", "13:26: convert names the target mnn twice."),
    ("convert:\n  scale_dtype: fp16", "convert: [{target: mnn-llm}, {target: mnn}]", "13:10: mnn and mnn-llm both make the"),
    ("block_size: 64", "scale_dtype: fp32", "14:3: scale_dtype fp16 cannot hold the scales of quantize_matmul (line 7)"),
    (
        "method: mse",
        "zero_point: float\n      symmetric: true",
        "8:7: zero_point: float and symmetric: true contradict each other; leave one out.",
    ),
    ("bits: 3", "bits: 8\n      zero_point: float", "at 8 bits leave zero_point: float out."),
    ("model: ./checkpoint", "", "the section 'model' is required"),
    ("model: ./checkpoint", "model: ''", "1:8: source is ''; string should have at least 1 character"),
    ("model: ./checkpoint", "model: !!python/object/apply:os.system [ls]", "1:8: the tag or type 'os.system' is not supported"),
    ("model: ./checkpoint", "model: &a ./checkpoint\nexport: {task: *a}", "anchors and aliases are not supported"),
    ("model: ./checkpoint", "1: 2", "a key must be plain text"),
    ("model: ./checkpoint", "model: [", "not YAML"),
    ("validate:\n  windows: 20", "validate: 3", "'validate' takes options: text, window"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named_with_their_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    # the second quantize_matmul, where there are two
    at = RECIPE.rindex(old)
    path = write(tmp_path, RECIPE[:at] + new + RECIPE[at + len(old) :])
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}:")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "a recipe is a mapping"), ("- a", "a recipe is a mapping"), ("model: a\npasses: []", "passes must be a list")],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


def test_files_that_cannot_be_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe. Did you mean 'demo-q3'"):
        find_recipe("demo-q33", ROOT / "recipes")
    with pytest.raises(RecipeError, match="no such recipe file"):
        find_recipe("missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 60 + "]" * 60)
    with pytest.raises(RecipeError, match="nested too deeply"):
        load_recipe(tmp_path / "deep.yaml")
    (tmp_path / "huge.yaml").write_text("# " + "x" * (2 << 20))
    with pytest.raises(RecipeError, match="not a recipe"):
        load_recipe(tmp_path / "huge.yaml")


def test_recipes_are_also_plain_yaml() -> None:
    for path in SHIPPED:
        assert yaml.safe_load(path.read_text("utf-8"))["passes"]
