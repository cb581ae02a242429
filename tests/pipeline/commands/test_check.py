"""A manifest that says anything but what was sealed, or what its files do not bear out, is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.report.manifest import Manifest, read_manifest
from lowbit.pipeline.store.digests import sha256

FLIPS = 400


def reseal(folder: Path, content: Any) -> None:
    """Write a manifest as whoever knows how the seal is made would: manifest, report and the report's hash agree."""
    report = folder / "report.html"
    before = content["seal"]
    made = Manifest.model_validate_json(json.dumps(content))
    report.write_text(report.read_text("utf-8").replace(before, made.digest), "utf-8")
    files = made.files | {"report.html": sha256(report)} if made.files else {}
    (folder / "manifest.json").write_text(made.model_copy(update={"seal": made.digest, "files": files}).text, "utf-8")


def content(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text("utf-8"))


def test_the_seal_is_shown(finished: Path) -> None:
    manifest = read_manifest(finished)
    assert manifest.seal == manifest.digest
    assert manifest.seal in (finished / "report.html").read_text("utf-8")
    assert (finished / "manifest.json").read_text("utf-8") == manifest.text
    check_folder(finished)


def test_every_flipped_byte_of_the_manifest_is_refused(finished: Path) -> None:
    path, chance = finished / "manifest.json", random.Random(0)
    whole = path.read_bytes()
    for place in sorted(chance.sample(range(len(whole)), FLIPS)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(PipelineError):
            check_folder(finished)
    path.write_bytes(whole)
    check_folder(finished)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made["quality"]["onnxruntime"].update(kl_divergence=0.0001), "what it says is not what was sealed"),
        (lambda made: made["model"].update(digest="0" * 64), "what it says is not what was sealed"),
        (lambda made: made["weights"]["lm_head"].update(codes_sha256="0" * 64), "what it says is not what was sealed"),
        (lambda made: made.update(seal="0" * 64), "what it says is not what was sealed"),
        (lambda made: made.update(files={}), "does not name README.md, which every result has"),
        (lambda made: made["files"].pop("onnx/config.json"), "config.json: not of this result"),
        (lambda made: made["files"].update({"onnx/other": "0" * 64}), "other: missing"),
        (lambda made: made["files"].update({"README.md": "0" * 64}), "README.md: changed since the run"),
    ],
)
def test_what_is_changed_by_hand_is_refused(finished: Path, change: Callable[[Any], Any], said: str) -> None:
    made = content(finished)
    change(made)
    (finished / "manifest.json").write_text(json.dumps(made, indent=1), "utf-8")
    with pytest.raises(PipelineError, match=said):
        check_folder(finished)


def test_another_way_to_write_the_same_is_refused(finished: Path) -> None:
    (finished / "manifest.json").write_text(json.dumps(content(finished), indent=2), "utf-8")
    with pytest.raises(PipelineError, match="what it says is not what was sealed"):
        check_folder(finished)


def test_the_report_of_another_result_is_refused(finished: Path) -> None:
    report, made = finished / "report.html", content(finished)
    report.write_text(report.read_text("utf-8").replace(made["seal"], "0" * 64), "utf-8")
    made["files"]["report.html"] = sha256(report)
    (finished / "manifest.json").write_text(json.dumps(made, indent=1), "utf-8")
    with pytest.raises(PipelineError, match=r"report.html: changed since the run; it shows another seal than manifest.json"):
        check_folder(finished)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made["size"].update(onnx_bytes=1), r"size.onnx_bytes is 1, the files say \d+"),
        (lambda made: made["size"].update(bits_per_weight=2.0), r"size.bits_per_weight is 2.0, the files say 3.625"),
        (lambda made: made.update(recipe_text="model: x"), "recipe_text is 'model: x', the files say"),
        (lambda made: made["weights"]["lm_head"].update(bits=2), "weights.lm_head.bits is 2, the files say 3"),
        (lambda made: made["weights"]["lm_head"].update(shape=[1, 1]), r"weights.lm_head.shape is \(1, 1\), the files say"),
        (lambda made: made["weights"]["lm_head"].update(bits_per_weight=3.0), "weights.lm_head.bits_per_weight is 3.0"),
        (lambda made: made["weights"]["lm_head"].update(codes_sha256="0" * 64), "weights.lm_head.codes_sha256 is '00"),
        (lambda made: made["weights"].pop("lm_head"), "weights is "),
        (
            lambda made: made["hand_offs"]["mnn"].update(weights_checked=1),
            r"\d codes of MNN were compared, the manifest says 1\.",
        ),
        (lambda made: made.update(files={}), "does not name README.md"),
    ],
)
def test_what_files_do_not_bear_out_is_refused_whatever_the_seal(
    finished: Path, change: Callable[[Any], Any], said: str
) -> None:
    made = content(finished)
    change(made)
    reseal(finished, made)
    with pytest.raises(PipelineError, match=said):
        check_folder(finished)


def test_files_that_no_run_made_are_named(finished: Path, tmp_path: Path) -> None:
    for name in ("note.txt", "mnn/more.bin"):
        (finished / name).write_text("?")
        with pytest.raises(PipelineError, match=f"{name}: not of this result, the manifest does not name it. Remove it"):
            check_folder(finished)
        (finished / name).unlink()
    os.mkfifo(finished / "onnx" / "pipe")
    with pytest.raises(PipelineError, match="pipe: not of this result"):
        check_folder(finished)
    (finished / "onnx" / "pipe").unlink()
    (finished / ".work-x").mkdir()
    (finished / ".work-x" / "model.onnx").write_text("under way")
    check_folder(finished)


@pytest.mark.parametrize("name", ["mnn", "onnx/config.json", "manifest.json"])
def test_links_are_refused(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.move(finished / name, tmp_path / "elsewhere")
    (finished / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PipelineError, match=f"{name}: a link, and no run makes one"):
        check_folder(finished)
