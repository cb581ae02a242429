"""`convert:` ONNX -> another engine, and the proof that nothing changed."""
