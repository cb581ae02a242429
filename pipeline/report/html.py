"""What a run leaves for people: report.html, which needs no network and no script, README.md, and a card for notebooks."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.report.charts import bytes_figure, position_figure
from lowbit.pipeline.report.drawing import svg
from lowbit.pipeline.report.manifest import Manifest
from lowbit.pipeline.report.summary import closing_rows
from lowbit.pipeline.report.template import page_template
from lowbit.pipeline.report.weight_maps import bytes_by_kind, weight_maps
from lowbit.pipeline.report.writings import writings

LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def write_pages(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Write report.html and README.md into `folder`, from a manifest alone; the card names the checkpoint's license file."""
    facts = {"manifest": manifest, "quality": manifest.quality, "verdict": verdict(manifest), "rows": closing_rows(manifest)}
    report = page_template("report.html.j2").render(**facts, pictures=_pictures(manifest), writings=writings(manifest))
    (folder / "report.html").write_text(report, "utf-8")
    license_file = next((name for name in LICENSES if (checkpoint.folder / name).exists()), None)
    (folder / "README.md").write_text(page_template("card.md.j2").render(**facts, license_file=license_file), "utf-8")


def result_card(manifest: Manifest) -> str:
    """A result at a glance, as an HTML element for notebooks."""
    facts = {"manifest": manifest, "quality": manifest.quality, "verdict": verdict(manifest)}
    return page_template("result.html.j2").render(**facts)


def verdict(manifest: Manifest) -> tuple[str, str]:
    """A word for the head of a page, and a sentence."""
    if manifest.missed:
        said = (f"{gate.name} is {gate.measured}, {gate.allowed} is allowed" for gate in manifest.missed)
        return "missed", "; ".join(said)
    engines = " and ".join(hand_off.label for hand_off in manifest.hand_offs.values())
    proven = f"the same codes in ONNX and {engines}, bit for bit" if engines else "no other engine was asked for"
    count = len(manifest.gates)
    gates = ("no gate was set", "its gate is passed")[count] if count < 2 else f"all {count} gates are passed"
    return "passed" if manifest.gates else "done", f"{gates}; {proven}"


def _pictures(manifest: Manifest) -> dict[str, str]:
    """Pictures of the report, by their names in its template."""
    drawn = {"bytes": svg(bytes_figure(bytes_by_kind(manifest))), **weight_maps(manifest)}
    if (text := manifest.quality.text) is not None:
        plain = () if manifest.quality.plain_rtn is None else manifest.quality.plain_rtn.kl_by_position
        drawn["positions"] = svg(position_figure(text.kl_by_position, plain, text.window))
    return drawn
