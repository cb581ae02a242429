"""MNN: `mnn-llm` makes the folder of its LLM runtime, `mnn` a model.mnn with the tensors of the ONNX file."""
