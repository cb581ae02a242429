"""A graph of lazy weights in, `model.onnx` with its data file out, one weight in memory at a time; and back."""
