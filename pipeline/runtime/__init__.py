"""An ONNX model in, numbers out: onnxruntime sessions, graphs run part by part, isolated processes."""
