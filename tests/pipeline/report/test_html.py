"""report.html and README.md of a real run: opened in a real browser, without network or script."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.report.html import write_pages
from lowbit.pipeline.report.manifest import Manifest
from lowbit.pipeline.report.quality import Quality
from lowbit.pipeline.report.template import visible
from tests.pipeline.report.manifests import manifest as manifest_of
from tests.pipeline.report.manifests import output_quality

ROOT = Path(__file__).parents[3]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIETLY = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")


@pytest.fixture
def made(results: Callable[..., Path], text: Path) -> Path:
    passes = ("narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32, include: [lm_head]}")
    last = "quantize_matmul: {bits: 2, block_size: 32, method: mse}"
    validate = f"validate: {{window: 64, windows: 4, text: {text}, max_kl_divergence: 5, max_perplexity_ratio: 2}}"
    return results(*passes, last, name="<mine>", validate=validate, kind="llama")


def browse(made: Path, scratch: Path, *options: str) -> bytes:
    page = scratch / "page.html"
    shutil.copy(made / "report.html", page)
    command = [str(CHROMIUM), *QUIETLY, f"--user-data-dir={scratch / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium")
def test_a_browser_shows_the_report(made: Path, tmp_path: Path) -> None:
    seen = browse(made, tmp_path, "--dump-dom").decode()
    manifest = json.loads((made / "manifest.json").read_text("utf-8"))
    for heading in ("Where the bytes went", "Bits of every weight", "What it writes", "Where it differs most", "Proof"):
        assert f"<h2>{heading}</h2>" in seen
    assert f"{manifest['quality']['onnxruntime']['kl_divergence']:.4f}" in seen
    assert manifest["model"]["digest"] in seen
    assert seen.count("<svg") == 4
    pictures = {}
    for scheme in ("1", "0"):
        shot = tmp_path / f"{scheme}.png"
        size = ("--window-size=900,3000", "--hide-scrollbars", f"--blink-settings=preferredColorScheme={scheme}")
        browse(made, tmp_path, *size, f"--screenshot={shot}")
        pictures[scheme] = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("L"), np.float64)
    assert pictures["1"].mean() > 200  # light
    assert pictures["0"].mean() < 80  # dark
    assert all(picture.std() > 10 for picture in pictures.values())  # and not empty


def test_the_report_needs_nothing_else(made: Path) -> None:
    page = (made / "report.html").read_text("utf-8")
    assert "<script" not in page
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "<h1>&lt;mine&gt;</h1>" in page  # what comes from outside is escaped


def test_what_is_shown_is_in_the_manifest(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text("utf-8"))
    found = manifest["quality"]["onnxruntime"]
    assert [gate["passed"] for gate in manifest["gates"]] == [True, True]
    assert found["kl_divergence"] == pytest.approx(np.mean([found["kl_by_position"]]), rel=0.1)
    assert len(found["worst_windows"]) == 3
    assert all(flip["kl_divergence"] > 0 for one in found["worst_windows"] for flip in one["flips"])
    assert manifest["quality"]["plain_rtn"]["kl_divergence"] > found["kl_divergence"]  # mse at 2 bits is better than rounding
    assert [set(one) for one in found["continuations"]] == [{"prompt", "float", "onnxruntime"}] * 3
    assert len(manifest["quality"]["mnn"]["memory_high"]["continuations"]) == 3
    assert all(0 < one["relative_error"] < 1 for one in manifest["weights"].values())
    assert {"report.html", "README.md"} <= set(manifest["files"])
    check_folder(made)


def test_the_card_has_front_matter(made: Path) -> None:
    _, front, text = (made / "README.md").read_text("utf-8").split("---\n", 2)
    front_matter = yaml.safe_load(front)
    assert front_matter["base_model_relation"] == "quantized"
    assert {"mnn", "onnx", "2-bit", "4-bit"} <= set(front_matter["tags"])
    assert "KL divergence" in text
    assert 'llm.create("mnn/config.json")' in text


def test_a_missed_gate_is_seen(made: Path, tmp_path: Path, tiny: Callable[..., Path]) -> None:
    manifest = json.loads((made / "manifest.json").read_text("utf-8"))
    manifest["gates"][0] |= {"passed": False, "allowed": 0.001}
    write_pages(tmp_path, Manifest.model_validate_json(json.dumps(manifest)), open_checkpoint(tiny("llama"), "x"))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert '<span class="verdict missed">missed</span>' in page
    assert "0.001 is allowed" in page


def test_signs_for_what_cannot_be_seen() -> None:
    assert visible(" a\tb\n ") == "\u2423a\u21e5b\u23ce\u2423"
    assert visible("  ") == "\u2423\u2423"


@pytest.mark.parametrize("quality", [Quality(), Quality(onnxruntime=output_quality())], ids=["not measured", "no text"])
def test_a_report_shows_what_there_is(tmp_path: Path, quality: Quality) -> None:
    write_pages(tmp_path, manifest_of(quality, Validate()), open_checkpoint(ROOT / "tests" / "models" / "qwen2-pydocs", "x"))
    page, card = ((tmp_path / name).read_text("utf-8") for name in ("report.html", "README.md"))
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Where the bytes went",
        "Bits of every weight",
        "Error of every weight",
        "All figures",
        "Proof",
        "Recipe",
        "Steps",
    ]
    assert ("largest relative error of an output" in page) == (quality.outputs is not None)
    assert "pipeline_tag" not in card
