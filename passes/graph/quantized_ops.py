"""The quantized operators: MatMulNBits at 2, 4 and 8 bits, and MatMul3Bits, which becomes one.

onnxruntime has no three-bit kernel. MatMul3Bits is a model-local function: it unpacks true three-bit bytes
to nibbles and calls MatMulNBits(bits=4) on them. onnxruntime inlines it, folds the unpacking when it loads
the model and runs its four-bit kernel.
"""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.graph.build import integers, scalar
from lowbit.passes.quant.pack import NIB77
from lowbit.passes.quant.quantized_weight import Part, QuantizedWeight

DOMAIN = "lowbit"
MICROSOFT = "com.microsoft"

_MATMUL_3_BITS = f"""
<ir_version: 10, opset_import: ["": 18, "{MICROSOFT}": 1, "{DOMAIN}": 1]>
holder (float[1] x) => (float[1] y) {{ y = Identity (x) }}

<domain: "{DOMAIN}", opset_import: ["": 18, "{MICROSOFT}": 1]>
MatMul3Bits <K, N, block_size, accuracy_level, bits, layout, nibble_shape> (A, B, scales, zero_points) => (Y)
{{
    nibble_mask = Constant <value = uint8 {{119}}> ()
    shifts = Constant <value = uint8[1, 3, 1] {{3, 2, 1}}> ()
    last_masks = Constant <value = uint8[1, 3, 1] {{17, 34, 68}}> ()
    quarters = BitwiseAnd (B, nibble_mask)
    shifted = BitShift <direction = "RIGHT"> (B, shifts)
    spread = BitwiseAnd (shifted, last_masks)
    last_0, last_1, last_2 = Split <axis = 1, num_outputs = 3> (spread)
    last_01 = BitwiseOr (last_0, last_1)
    last = BitwiseOr (last_01, last_2)
    bytes = Concat <axis = 1> (quarters, last)
    shape = Constant <value_ints: ints = @nibble_shape> ()
    nibbles = Reshape (bytes, shape)
    Y = {MICROSOFT}.MatMulNBits <K: int = @K, N: int = @N, block_size: int = @block_size, bits = 4,
        accuracy_level: int = @accuracy_level> (A, nibbles, scales, zero_points)
}}
"""


def add_matmul(graph: gs.Graph, weight: QuantizedWeight, x: gs.Tensor, y: gs.Tensor, accuracy_level: int) -> gs.Node:
    """Add y = x @ dequantized(weight).T to the graph; x float32 [..., K], y float32 [..., N].

    The node is named after the layer and its constants `<layer>.codes`, `.scales`, `.zero_points` or `.offsets`.
    """
    form, (n, k) = weight.form, weight.source.shape
    constants = {part: gs.Constant(f"{weight.name}.{part}", values) for part, values in weight.parts.items()}
    scales = as_float(graph, weight, "scales", constants["scales"])
    inputs = [x, constants["codes"], scales]
    zeros = _free_zero_points(graph, weight, constants["offsets"], scales) if form.free else constants.get("zero_points")
    attrs: dict[str, object] = {"K": k, "N": n, "block_size": form.block_size, "accuracy_level": accuracy_level}
    blocks = form.block_count(k)
    if form.bits == 3:
        _declare_matmul_3_bits(graph)
        attrs |= {"bits": 3, "layout": NIB77, "nibble_shape": [n, blocks, form.block_size // 2]}
        zeros = zeros or _middle_nibbles(graph, weight, n, -(-blocks // 2))
        node = gs.Node("MatMul3Bits", weight.name, attrs, [*inputs, zeros], [y], domain=DOMAIN)
    else:
        inputs += [] if zeros is None else [zeros]
        node = gs.Node("MatMulNBits", weight.name, attrs | {"bits": form.bits}, inputs, [y], domain=MICROSOFT)
    graph.nodes.append(node)
    return node


def quantized_weight(node: gs.Node) -> QuantizedWeight | None:
    """The weight of a node that `add_matmul` or `quantize_embedding` made, else None."""
    if node.op not in ("MatMulNBits", "MatMul3Bits", "GatherBlockQuantized"):
        return None
    values = node.inputs[0 if node.op == "GatherBlockQuantized" else 1]._values
    return values.of if isinstance(values, Part) else None


def quantized_matmuls(graph: gs.Graph) -> list[tuple[gs.Node, QuantizedWeight]]:
    """Every quantized MatMul of a graph and its weight; lookups in quantized tables are none."""
    nodes = (node for node in graph.nodes if node.op != "GatherBlockQuantized")
    return [(node, weight) for node in nodes if (weight := quantized_weight(node)) is not None]


def replace_weight(node: gs.Node, old: QuantizedWeight, new: QuantizedWeight) -> None:
    """Let a quantized MatMul multiply by another weight of the same form."""
    todo = list(node.inputs[1:])
    while todo:
        tensor = todo.pop()
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, Part) and tensor._values.of is old:
            tensor.values = new.parts[tensor._values.part]
        todo += [t for maker in tensor.inputs for t in maker.inputs]


def as_float(graph: gs.Graph, weight: QuantizedWeight, part: str, values: gs.Constant) -> gs.Tensor:
    """Scales or offsets as float32: half-precision ones are widened by a Cast that onnxruntime folds at load."""
    if values._values.onnx_dtype == TensorProto.FLOAT:
        return values
    wide = gs.Variable(f"{weight.name}.{part}_fp32", np.float32, values.shape)
    graph.nodes.append(gs.Node("Cast", f"{weight.name}.widen_{part}", {"to": TensorProto.FLOAT}, [values], [wide]))
    return wide


def _free_zero_points(graph: gs.Graph, weight: QuantizedWeight, offsets: gs.Constant, scales: gs.Tensor) -> gs.Tensor:
    """2^(bits-1) - offsets / scales, float32 [N, blocks], folded at load: so the file holds what MNN's holds."""
    steps, zeros = (gs.Variable(f"{weight.name}.{what}", np.float32, offsets.shape) for what in ("steps", "zero_points"))
    middle = scalar(f"{weight.name}.middle", weight.form.middle)
    wide = as_float(graph, weight, "offsets", offsets)
    graph.nodes.append(gs.Node("Div", steps.name, {}, [wide, scales], [steps]))
    graph.nodes.append(gs.Node("Sub", zeros.name, {}, [middle, steps], [zeros]))
    return zeros


def _middle_nibbles(graph: gs.Graph, weight: QuantizedWeight, *shape: int) -> gs.Tensor:
    """Zero points 4, packed as nibbles, made at load: MatMulNBits(bits=4) would take 8 when none are given."""
    zeros = gs.Variable(f"{weight.name}.zero_points", np.uint8, shape)
    attrs = {"value": gs.Constant("", np.array([0x44], np.uint8))}
    size = integers(f"{weight.name}.zero_points_shape", *shape)
    graph.nodes.append(gs.Node("ConstantOfShape", zeros.name, attrs, [size], [zeros]))
    return zeros


def _declare_matmul_3_bits(graph: gs.Graph) -> None:
    if any(function.name == "MatMul3Bits" for function in graph.functions):
        return
    # the checker wants the operator set of the graph; the operators are the same in all from 18 on
    text = _MATMUL_3_BITS.replace('"": 18', f'"": {graph.opset}')
    holder = gs.import_onnx(onnx.parser.parse_model(text))
    graph.functions.extend(holder.functions)
