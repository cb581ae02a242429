"""A quantized ONNX model in, another engine's folder out, and the proof that nothing changed. One room for each engine."""
