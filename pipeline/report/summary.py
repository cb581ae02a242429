"""What a person looks at when a run is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowbit.pipeline.report.bits_map import bits_map
from lowbit.pipeline.report.units import megabytes

ENGINES = {"mnn": "MNN", "genai": "genai"}
"""What hand-offs are called in tables, by their folders."""
MODES = {
    "memory_high": "memory high", "memory_low": "memory low", "accuracy_level_0": "float arithmetic", "as_run": "as it runs",
}  # fmt: skip
"""The ways that engines compute, by their names in the manifest."""


def show_result(console: Console, manifest: dict[str, Any], folder: Path) -> None:
    """Print size, quality and proof of a finished run, and where the files are."""
    console.print(closing_table(manifest))
    if (bits := bits_map({name: (one["bits"], one["block_size"]) for name, one in manifest["weights"].items()})) is not None:
        console.print(bits)
    for kind in ("onnx", *manifest["hand_offs"]):
        console.print(f"  {folder / kind}", soft_wrap=True, highlight=False)


def closing_table(manifest: dict[str, Any]) -> Table:
    """Size, quality and proof of a finished run."""
    table = Table(title=manifest["recipe"], show_header=False, title_justify="left")
    for row in closing_rows(manifest):
        table.add_row(*row)
    return table


def closing_rows(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and figures of a finished run."""
    size, quality, hand_offs = manifest["size"], manifest["quality"], manifest["hand_offs"]
    weights = manifest["weights"].values()
    rows = [
        ("bits per weight", f"{size['bits_per_weight']:.3f} (scales and zero points counted)"),
        ("bits, blocks, methods", ", ".join(sorted({f"{w['bits']}/{w['block_size']} {w['method']}" for w in weights}))),
        ("ONNX", megabytes(size["onnx_bytes"])),
    ]
    rows += [(ENGINES[folder], megabytes(size[f"{folder}_bytes"])) for folder in hand_offs]
    found = quality.get("onnxruntime")
    if found and "outputs" in found:
        rows += _output_rows("", found["outputs"])
        if "as_run" in found:
            rows += _output_rows(f" at accuracy_level {found['as_run']['accuracy_levels'][0]}", found["as_run"]["outputs"])
    elif found:
        rows += [
            ("perplexity", f"{found['perplexity']:.2f} (float model {found['reference_perplexity']:.2f})"),
            ("KL divergence", f"{found['kl_divergence']:.4f} nats per token over {found['tokens']:,} tokens"),
            ("same top token", f"{found['top1_agreement']:.1%}"),
            ("worst window", f"number {found['worst_window'] + 1}, KL {found['worst_window_kl']:.4f}"),
        ]
        if "as_run" in found:
            own = found["as_run"]
            level = ", ".join(map(str, own["accuracy_levels"]))
            rows.append((f"at accuracy_level {level}", f"perplexity {own['perplexity']:.2f}, KL {own['kl_divergence']:.4f}"))
    for folder, one in hand_offs.items():
        rows.append((f"{ENGINES[folder]} codes", f"{one['weights_checked']:,} equal bit for bit"))
        rows += _runtime_rows(ENGINES[folder], quality[folder])
    return rows


def _runtime_rows(engine: str, found: dict[str, Any]) -> list[tuple[str, str]]:
    if "skipped" in found:
        return [(f"{engine} runtime", f"not compared: {found['skipped']}")]
    modes = {title: found[mode] for mode, title in MODES.items() if mode in found}
    if "tokenizer" not in found:
        return [
            (f"{engine}, {title}", f"outputs within {one['relative_error']:.1e} of onnxruntime") for title, one in modes.items()
        ]
    return [
        *(
            (
                f"{engine}, {title}",
                f"logits within {one['relative_error']:.1e} of onnxruntime, perplexity {one['perplexity']:.2f}",
            )
            for title, one in modes.items()
        ),
        (f"{engine}, tokenizer", _tokenizer_row(found["tokenizer"])),
        *_template_rows(engine, found["chat_template"]),
    ]


def _output_rows(how: str, outputs: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"{name}{how}", f"relative error {one['relative_error']:.2e}, cosine similarity {one['least_cosine']:.5f} or more")
        for name, one in outputs.items()
    ]


def _tokenizer_row(found: dict[str, Any]) -> str:
    example = "" if found["example"] is None else f"; another for {found['example']!a}"
    return f"the same ids for {found['equal']} of {found['texts']} texts{example}"


def _template_rows(engine: str, found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    example = "" if found["example"] is None else f": {found['example']}"
    return [
        (f"{engine}, chat template", f"the same text for {found['equal']} of {found['conversations']} conversations{example}")
    ]
