"""onnxruntime on graphs built by hand: float32, int8 dynamic and static, int4.

One session per copy of the weight. Its CPU provider has no bf16, so it is given float32 inputs
made ahead of the clock. Threads spin between calls, its default and its fastest; the harness waits
until they are quiet before another side is timed.
Source: onnxruntime's ContribOperators page (com.microsoft).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from bigops.benches.harness import LeftOut, Side, copies, in_turn
from bigops.benches.limits import Cost
from bigops.benches.rivals import GATED, Int4Weight, Layer, round_int8

MICROSOFT = "com.microsoft"


def available() -> bool:
    """Whether onnxruntime and onnx are installed; they are not loaded for that."""
    return all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx"))


class Graph:
    """An ONNX graph under construction; every method gives the name of what it added."""

    def __init__(self) -> None:
        if not available():
            raise LeftOut("onnxruntime or onnx is not installed")
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Tensor) -> str:
        """A weight, or any value known ahead."""
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def add(self, kind: str, *inputs: str, outs: int = 1, domain: str = "", **options: Any) -> Any:
        """A node; the name of its output, or a list of names where it has several."""
        from onnx import helper

        names = [f"n{len(self.nodes)}_{place}" for place in range(outs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **options))
        return names[0] if outs == 1 else names

    def scale_and_zero(self, low: float, high: float) -> list[str]:
        """Step and zero point (uint8) of values from ``low`` to ``high``, zero among them."""
        low, high = min(0.0, low), max(0.0, high)
        step = max(high - low, 1e-12) / 255
        zero = torch.tensor(round(-low / step), dtype=torch.uint8)
        return [self.constant(torch.tensor(step)), self.constant(zero)]

    def activate(self, name: str, z: str) -> str:
        """The activation of a case on the value ``z``.

        Raises:
            LeftOut: no such activation.
        """
        if name in GATED:
            gate, up = self.add("Split", z, outs=2, axis=-1, num_outputs=2)
            return self.add("Mul", self.activate(GATED[name], gate), up)
        if name == "none":
            return z
        if name == "relu2":
            positive = self.add("Relu", z)
            return self.add("Mul", positive, positive)
        if name == "silu":
            return self.add("Mul", z, self.add("Sigmoid", z))
        if name in ("gelu", "gelu_tanh"):
            return self.add("Gelu", z, approximate="tanh" if name == "gelu_tanh" else "none")
        if name not in ("relu", "sigmoid", "tanh"):
            raise LeftOut(f"onnxruntime: no graph for {name}")
        return self.add(name.capitalize(), z)

    def serialized(
        self, inputs: dict[str, list[int]], output: str, shape: list[int], name: str = "layer"
    ) -> bytes:
        """The model as bytes, of float32 inputs and one float32 output ``y``."""
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Identity", [output], ["y"]))
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            name,
            [value(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()],
            [value("y", TensorProto.FLOAT, shape)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 10  # the newest that opset 21 needs; older runtimes refuse newer ones
        return bytes(model.SerializeToString())


def bind(
    model: bytes, inputs: dict[str, Tensor], shape: list[int]
) -> tuple[Any, Any, Tensor, object]:
    """A model on torch's memory: (session, binding, output, what must stay alive).

    The binding holds addresses only.
    """
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    out = torch.empty(shape)
    for name, tensor in inputs.items():
        dims = list(tensor.shape)
        binding.bind_input(name, "cpu", 0, numpy.float32, dims, tensor.data_ptr())
    binding.bind_output("y", "cpu", 0, numpy.float32, shape, out.data_ptr())
    return session, binding, out, inputs


# --- the sides ---------------------------------------------------------------------------------


def fp32(layer: Layer) -> Side:
    """Float32 throughout."""
    graph = Graph()
    wide = layer.weight.float()
    y = graph.add("MatMul", "x", graph.constant(wide.t()))
    cost = layer.cost("fp32", float(wide.nbytes))
    return _side(layer, "onnxruntime fp32", graph, _with_bias(layer, graph, y), cost, wide.nbytes)


def int8_dynamic(layer: Layer) -> Side:
    """int8 rows of W; x by one scale and zero point a call, found at run time."""
    graph = Graph()
    values, scale = round_int8(layer.weight)
    parts = ["x", graph.constant(values.t()), graph.constant(scale), ""]
    if layer.bias is not None:
        parts.append(graph.constant(layer.bias.float()))
    y = graph.add("DynamicQuantizeMatMul", *parts, domain=MICROSOFT)
    cost = layer.cost("int8", float(values.nbytes))
    return _side(layer, "onnxruntime int8", graph, y, cost, values.nbytes)


def int8_static(layer: Layer) -> Side:
    """int8 rows of W, x by one scale that is known ahead (its true range here)."""
    graph = Graph()
    values, scale = round_int8(layer.weight)
    known = graph.scale_and_zero(float(layer.x.min()), float(layer.x.max()))
    quantized = graph.add("QuantizeLinear", "x", *known)
    # what its optimiser makes of QuantizeLinear, DequantizeLinear and MatMul
    parts = [quantized, graph.constant(values.t()), known[0], graph.constant(scale), known[1], ""]
    if layer.bias is not None:
        parts.append(graph.constant(layer.bias.float()))
    y = graph.add("MatMulIntegerToFloat", *parts, domain=MICROSOFT)
    cost = layer.cost("int8", float(values.nbytes))
    return _side(layer, "onnxruntime int8 static", graph, y, cost, values.nbytes)


def int4(layer: Layer, weight: Int4Weight, accuracy_level: int) -> Side:
    """int4 groups by MatMulNBits: products in float32 (level 0) or int8 (level 4).

    Raises:
        LeftOut: not installed, or the group is not one that it serves.
    """
    if weight.group not in (16, 32, 64, 128, 256):
        raise LeftOut(f"onnxruntime int4: no groups of {weight.group}")
    graph = Graph()
    n, k = weight.values.shape
    groups = k // weight.group
    unsigned = (weight.values.to(torch.int16) + 8).to(torch.uint8).view(n, groups, weight.group)
    packed = unsigned[:, :, 0::2] | (unsigned[:, :, 1::2] << 4)  # zero point 8 is its default
    y = graph.add(
        "MatMulNBits",
        "x",
        graph.constant(packed),
        graph.constant(weight.scale.reshape(-1)),
        domain=MICROSOFT,
        K=k,
        N=n,
        bits=4,
        block_size=weight.group,
        accuracy_level=accuracy_level,
    )
    unit = "int8" if accuracy_level == 4 else "fp32"
    name, cost = f"onnxruntime int4 {unit}", layer.cost(unit, float(weight.nbytes))
    return _side(layer, name, graph, _with_bias(layer, graph, y), cost, weight.nbytes)


def _with_bias(layer: Layer, graph: Graph, y: str) -> str:
    if layer.bias is None:
        return y
    return str(graph.add("Add", y, graph.constant(layer.bias.float())))


def _side(layer: Layer, name: str, graph: Graph, y: str, cost: Cost, nbytes: int) -> Side:
    y = graph.activate(layer.activation, y)
    inputs = {"x": layer.x.float().contiguous()}
    if layer.residual is not None:
        inputs["r"] = layer.residual.float().contiguous()
        y = graph.add("Add", y, "r")
    n = layer.weight.shape[0] // (2 if layer.activation in GATED else 1)
    shape = [layer.x.shape[0], n]
    model = graph.serialized({name: list(t.shape) for name, t in inputs.items()}, y, shape)
    first = bind(model, inputs, shape)
    take = in_turn(copies(layer.case, first, nbytes, lambda _: bind(model, inputs, shape)))

    def call() -> Tensor:
        session, binding, out, _ = take()
        session.run_with_iobinding(binding)
        return out

    return Side(name, call, cost, name, own_pool=True)
