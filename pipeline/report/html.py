"""What a run leaves for people: report.html, which needs no network and no script, and README.md, a model card."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lowbit.passes.graph.names import LAYER
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.report.figures import bytes_figure, map_figure, position_figure, svg
from lowbit.pipeline.report.summary import ENGINES, MODES, closing_rows
from lowbit.pipeline.report.units import megabytes

LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def write_pages(folder: Path, manifest: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Write report.html and README.md into `folder`, from a manifest alone; the card names the checkpoint's licence file."""
    facts = _facts(manifest)
    licence = next((name for name in LICENSES if (checkpoint.folder / name).exists()), None)
    for template, name in (("report.html.j2", "report.html"), ("card.md.j2", "README.md")):
        text = page_template(template).render(**facts, licence=licence)
        (folder / name).write_text(text, "utf-8")


def page_template(template: str) -> jinja2.Template:
    """A template of pages/; values are escaped in pages, not in Markdown."""
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    made = jinja2.Environment(
        loader=loader, autoescape=".html" in template, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["megabytes"] = megabytes
    made.filters["visible"] = visible
    return made.get_template(template)


def visible(text: str) -> str:
    """Text on one line: breaks, tabs, and spaces at its ends as signs."""
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" ")) if inner else len(text)
    signs = "\u2423" * before + inner + "\u2423" * (len(text) - before - len(inner))
    return signs.replace("\n", "\u23ce").replace("\t", "\u21e5").replace("\r", "\u240d")


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    quality = manifest["quality"]
    found = quality.get("onnxruntime", {})
    plain = quality.get("plain_rtn")
    figures = {}
    if "kl_by_position" in found:
        window = next(step["options"]["window"] for step in manifest["steps"] if step["name"] == "validate")
        figures["positions"] = svg(position_figure(found["kl_by_position"], (plain or {}).get("kl_by_position"), window))
    return {
        "manifest": manifest, "rows": closing_rows(manifest), "found": found, "plain": plain,
        "verdict": _verdict(manifest), "figures": {"bytes": svg(bytes_figure(_bytes(manifest))), **_maps(manifest), **figures},
        "writings": _writings(quality), "engines": ENGINES,
        "folders": ["onnx", *manifest["hand_offs"]],
        "bit_tags": [f"{bits}-bit" for bits in sorted({one["bits"] for one in manifest["weights"].values()})],
        "proofs": [
            {"engine": ENGINES[name], "checked": one["weights_checked"], "error": one["max_relative_error"]}
            for name, one in manifest["hand_offs"].items()
        ],
        "seconds": sum(step["seconds"] for step in manifest["steps"]),
        "peak": max(step["peak_rss_bytes"] for step in manifest["steps"]),
    }  # fmt: skip


def _verdict(manifest: dict[str, Any]) -> tuple[str, str]:
    """A word for the head of the page, and a sentence."""
    missed = [one for one in manifest["gates"] if not one["passed"]]
    if missed:
        return "missed", "; ".join(f"{one['name']} is {one['found']:.4f}, {one['allowed']} is allowed" for one in missed)
    exact = [ENGINES[name] for name, one in manifest["hand_offs"].items() if one["bit_exact"]]
    proven = f"the same codes in ONNX and {' and '.join(exact)}, bit for bit" if exact else "no other engine was asked for"
    count = len(manifest["gates"])
    gates = ("no gate was set", "its gate is passed")[count] if count < 2 else f"all {count} gates are passed"
    return "passed" if manifest["gates"] else "done", f"{gates}; {proven}"


def _bytes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of the ONNX folder by kind of layer; the rest is what stays float, the graph and the tokenizer."""
    parts: dict[str, int] = defaultdict(int)
    for name, one in manifest["weights"].items():
        parts[_kind(name)] += round(math.prod(one["shape"]) * one["bits_per_weight"] / 8)
    return {**parts, "float, graph, tokenizer": max(0, manifest["size"]["onnx_bytes"] - sum(parts.values()))}


def _kind(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")


def _maps(manifest: dict[str, Any]) -> dict[str, str]:
    """Bits and relative errors, layers by projections, where the model has layers."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for name, one in manifest["weights"].items():
        found = LAYER.search(f"{name}.")
        cells[found.group(1) if found else "", _kind(name)] = one
    rows = sorted({row for row, _ in cells}, key=lambda row: int(row or 1 << 30))
    columns = list(dict.fromkeys(column for _, column in cells))
    if not any(rows):
        return {}
    grid = [[cells.get((row, column)) for column in columns] for row in rows]
    drawn = {}
    for title, key, form, colors in (
        ("bits", "bits", "{bits}/{block_size}", "RdYlGn"),
        ("errors", "relative_error", "{relative_error:.3f}", "YlOrRd"),
    ):
        values = np.array([[np.nan if one is None else float(one[key]) for one in row] for row in grid])
        texts = [["" if one is None else form.format(**one) for one in row] for row in grid]
        drawn[title] = svg(map_figure([row or "after" for row in rows], columns, values, texts, colors))
    return drawn


def _writings(quality: dict[str, Any]) -> list[dict[str, Any]]:
    """For each prompt what every engine wrote, cut where it leaves the float model's text."""
    shown = []
    for number, one in enumerate(quality.get("onnxruntime", {}).get("continuations", ())):
        texts = {"float model": one["float"], "onnxruntime": one["onnxruntime"]}
        for folder in (name for name in ENGINES if name in quality):
            for mode, title in MODES.items():
                if "continuations" in (measured := quality[folder].get(mode, {})):
                    texts[f"{ENGINES[folder]}, {title}"] = measured["continuations"][number]
        lines = []
        for name, text in texts.items():
            same = next((i for i, (a, b) in enumerate(zip(text, one["float"], strict=False)) if a != b), len(text))
            lines.append({"name": name, "same": text[:same], "other": text[same:]})
        shown.append({"prompt": one["prompt"], "lines": lines})
    return shown
