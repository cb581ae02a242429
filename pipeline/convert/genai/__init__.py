"""onnxruntime-genai: the graph in onnxruntime's own operators, with tokenizer and configuration."""
