"""A checkpoint in, a float ONNX graph out, its weights still in the checkpoint's files."""
