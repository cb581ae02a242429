"""A float model and its result in, figures out: KL divergence, perplexity, relative errors, the text that each writes."""
