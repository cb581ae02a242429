"""What a person looks at when a run is over."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowbit.pipeline.report.bits_map import bits_map
from lowbit.pipeline.report.engine_quality import EngineOnText, EngineQuality, NotCompared, TemplateMatch, TokenizerMatch
from lowbit.pipeline.report.manifest import Manifest
from lowbit.pipeline.report.output_quality import OutputErrors, OutputQuality
from lowbit.pipeline.report.plain_text import plain, plain_title
from lowbit.pipeline.report.records import HandOff
from lowbit.pipeline.report.text_quality import TextQuality
from lowbit.pipeline.report.units import megabytes

Row = tuple[str, str]
"""A name and what is said of it."""
QUICK = "quickly, on one window of text and 8 tokens of its own; set compare: full for more"


def show_result(console: Console, manifest: Manifest, folder: Path) -> None:
    """Print size, quality and proof of a finished run, and where the files are."""
    console.print(closing_table(manifest))
    forms = {name: (weight.bits, weight.block_size) for name, weight in manifest.weights.items()}
    if (bits := bits_map(forms)) is not None:
        console.print(bits)
    for kind in manifest.folders:
        console.print(plain(f"  {folder / kind}"), soft_wrap=True)


def closing_table(manifest: Manifest) -> Table:
    """Size, quality and proof of a finished run."""
    table = Table(title=plain_title(manifest.recipe), show_header=False, title_justify="left")
    for row in closing_rows(manifest):
        table.add_row(*map(plain, row))
    return table


def closing_rows(manifest: Manifest) -> list[Row]:
    """Names and figures of a finished run."""
    size, quality = manifest.size, manifest.quality
    forms = sorted({f"{weight.bits}/{weight.block_size} {weight.method}" for weight in manifest.weights.values()})
    rows = [
        ("bits per weight", f"{size.bits_per_weight:.3f} (scales and zero points counted)"),
        ("bits, blocks, methods", ", ".join(forms)),
        ("ONNX", megabytes(size.onnx_bytes)),
    ]
    rows += [(hand_off.label, megabytes(size.of(folder))) for folder, hand_off in manifest.hand_offs.items()]
    if quality.text is not None:
        rows += _text_rows(quality.text)
    if quality.outputs is not None:
        rows += _outputs_rows(quality.outputs)
    for folder, hand_off in manifest.hand_offs.items():
        rows.append((f"{hand_off.label} codes", f"{hand_off.weights_checked:,} equal bit for bit"))
        rows += _engine_rows(hand_off, quality.engines[folder])
    return rows


def _text_rows(text: TextQuality) -> list[Row]:
    rows = [
        ("perplexity", f"{text.perplexity:.2f} (float model {text.reference_perplexity:.2f})"),
        ("KL divergence", f"{text.kl_divergence:.4f} nats per token over {text.tokens:,} tokens"),
        ("same top token", f"{text.top1_agreement:.1%}"),
        ("worst window", f"number {text.worst_window + 1}, KL {text.worst_window_kl:.4f}"),
    ]
    if (as_run := text.as_run) is not None:
        level = ", ".join(map(str, as_run.accuracy_levels))
        rows.append((f"at accuracy_level {level}", f"perplexity {as_run.perplexity:.2f}, KL {as_run.kl_divergence:.4f}"))
    elif text.as_run_skipped is not None:
        rows.append(("as it runs", text.as_run_skipped))
    return rows


def _outputs_rows(quality: OutputQuality) -> list[Row]:
    rows = _error_rows("", quality.outputs)
    if (as_run := quality.as_run) is not None:
        rows += _error_rows(f" at accuracy_level {as_run.accuracy_levels[0]}", as_run.outputs)
    return rows


def _error_rows(how: str, outputs: OutputErrors) -> list[Row]:
    return [
        (f"{name}{how}", f"relative error {error.relative_error:.2e}, cosine similarity {error.least_cosine:.5f} or more")
        for name, error in outputs.items()
    ]


def _engine_rows(hand_off: HandOff, figures: EngineQuality) -> list[Row]:
    engine = hand_off.label
    if isinstance(figures, NotCompared):
        return [(f"{engine} runtime", f"not compared: {figures.skipped}")]
    if isinstance(figures, EngineOnText):
        return [
            *(
                (
                    f"{engine}, {hand_off.modes[name]}",
                    f"logits within {mode.relative_error:.1e} of onnxruntime, perplexity {mode.perplexity:.2f}",
                )
                for name, mode in figures.modes.items()
            ),
            *([(f"{engine}, compared", QUICK)] if hand_off.options.get("compare") == "quick" else []),
            (f"{engine}, tokenizer", _tokenizer(figures.tokenizer)),
            *([] if figures.chat_template is None else [(f"{engine}, chat template", _template(figures.chat_template))]),
        ]
    return [
        (f"{engine}, {hand_off.modes[name]}", f"outputs within {mode.relative_error:.1e} of onnxruntime")
        for name, mode in figures.modes.items()
    ]


def _tokenizer(match: TokenizerMatch) -> str:
    example = "" if match.example is None else f"; another for {match.example!a}"
    return f"the same ids for {match.equal} of {match.texts} texts{example}"


def _template(match: TemplateMatch) -> str:
    example = "" if match.example is None else f": {match.example}"
    return f"the same text for {match.equal} of {match.conversations} conversations{example}"
