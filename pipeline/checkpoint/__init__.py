"""A model's name or folder in; lazy weights, configuration, tokenizer and chat template out. No weight is loaded."""
