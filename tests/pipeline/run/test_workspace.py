"""What a finished run leaves of the one before it: nothing that it made itself."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.run.workspace import publish


def test_what_the_last_result_had_more_is_gone(tmp_path: Path) -> None:
    work, target = tmp_path / "work", tmp_path / "target"
    for folder in (work / "onnx", target / "mnn", target / "mine"):
        folder.mkdir(parents=True)
    (target / "elsewhere").mkdir()
    (target / "elsewhere" / "kept").write_text("mine")
    (target / "onnx").symlink_to(target / "elsewhere")
    (target / "resolved.yaml").write_text("of a budget that is none any more")
    (work / "onnx" / "model.onnx").write_text("new")
    (work / "manifest.json").write_text("{}")
    publish(work, target)
    assert sorted(path.name for path in target.iterdir()) == ["elsewhere", "manifest.json", "mine", "onnx"]
    assert (target / "onnx" / "model.onnx").read_text() == "new"
    assert not (target / "onnx").is_symlink()
    assert (target / "elsewhere" / "kept").read_text() == "mine"
