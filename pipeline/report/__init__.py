"""What a run made in, what people read out: progress, summary, manifest, report.html and model card."""
