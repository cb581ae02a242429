"""What a person looks at when a run is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show_result(console: Console, manifest: dict[str, Any], folder: Path) -> None:
    """Print size, quality and proof of a finished run, and where the files are."""
    console.print(closing_table(manifest))
    for kind in ("onnx", "mnn"):
        if manifest["size"][f"{kind}_bytes"]:
            console.print(f"  {folder / kind}", soft_wrap=True, highlight=False)


def closing_table(manifest: dict[str, Any]) -> Table:
    """Size, quality and proof of a finished run."""
    table = Table(title=manifest["recipe"], show_header=False, title_justify="left")
    for row in _rows(manifest):
        table.add_row(*row)
    return table


def _rows(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    size, quality, mnn = manifest["size"], manifest["quality"], manifest["mnn"]
    weights = manifest["weights"].values()
    rows = [
        ("bits per weight", f"{size['bits_per_weight']:.3f} (scales and zero points counted)"),
        ("bits, blocks, methods", ", ".join(sorted({f"{w['bits']}/{w['block_size']} {w['method']}" for w in weights}))),
        ("ONNX", megabytes(size["onnx_bytes"])),
    ]
    if size["mnn_bytes"]:
        rows.append(("MNN", megabytes(size["mnn_bytes"])))
    found = quality.get("onnxruntime")
    if found:
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
    if mnn:
        rows.append(("MNN codes", f"{mnn['weights_checked']:,} equal bit for bit"))
        rows += _runtime_rows(quality["mnn"])
    return rows


def _runtime_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    if "skipped" in found:
        return [("MNN runtime", f"not compared: {found['skipped']}")]
    high, low = found["memory_high"], found["memory_low"]
    return [
        ("MNN, memory high", f"logits within {high['relative_error']:.1e} of onnxruntime, perplexity {high['perplexity']:.2f}"),
        ("MNN, memory low", f"logits within {low['relative_error']:.1e}, perplexity {low['perplexity']:.2f}"),
        ("MNN, tokenizer", _tokenizer_row(found["tokenizer"])),
        *_template_rows(found["chat_template"]),
    ]


def _tokenizer_row(found: dict[str, Any]) -> str:
    example = "" if found["example"] is None else f"; another for {found['example']!a}"
    return f"the same ids for {found['equal']} of {found['texts']} texts{example}"


def _template_rows(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    example = "" if found["example"] is None else f": {found['example']}"
    return [("MNN, chat template", f"the same text for {found['equal']} of {found['conversations']} conversations{example}")]


def megabytes(count: int) -> str:
    """Bytes in units of 10^6 or 10^9."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
