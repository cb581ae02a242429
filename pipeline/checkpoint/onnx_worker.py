"""An ONNX file tried in a process with limits: `python -m lowbit.pipeline.checkpoint.onnx_worker FILE`.

onnx's checker and its converter between versions, its inference of shapes and onnxruntime's optimizer are C++ that reads what a
stranger wrote. They may crash, and constants may be computed from small ones without end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import onnx
import onnxruntime

from lowbit.pipeline.checkpoint.onnx_model import OnnxModel, disk_bytes
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.limits import OUT_OF_MEMORY, limit_memory, limit_seconds, onnx_limits


def _main(name: str) -> int:
    file = Path(name)
    seconds, size = onnx_limits(disk_bytes(file.parent), os.cpu_count() or 1)
    limit_seconds(seconds)
    limit_memory(size)
    try:
        OnnxModel(file.parent, name, None, file).graph()  # refused here is refused there, with a sentence
        onnx.shape_inference.infer_shapes(onnx.load(name, load_external_data=False))
        _open_session(name)
    except MemoryError:
        return OUT_OF_MEMORY
    except CheckpointError:
        return 0
    except Exception as error:  # onnxruntime's of any kind: what it lacks, such as an operator, is named when it is wanted
        return OUT_OF_MEMORY if "alloc" in str(error).lower() else 0
    return 0


def _open_session(name: str) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
