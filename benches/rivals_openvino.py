"""OpenVINO on graphs built by hand, so that its own formats are reached and not only its plug-in.

One model per copy of the weight, all threads on one stream, results written to torch's memory.
Source: OpenVINO's CPU device page (precision hint, dynamic quantisation, weight compression).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigops.benches.harness import LeftOut, Side, copies, in_turn
from bigops.benches.rivals import GATED, Int4Weight, Layer, round_int8

# OpenVINO computes fp32 models in bf16 where the CPU has it, unless it is told not to.
FP32 = {"INFERENCE_PRECISION_HINT": "f32"}
BF16 = {"INFERENCE_PRECISION_HINT": "bf16"}
Weight = Callable[[Any], Any]  # the opset -> the node of a float [N, K] matrix


def available() -> bool:
    """Whether OpenVINO is installed; it is not loaded for that."""
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def core() -> tuple[Any, Any]:
    """OpenVINO's core and its operators.

    Raises:
        LeftOut: not installed, or it does not load.
    """
    if not available():
        raise LeftOut("openvino is not installed")
    try:
        import openvino
        from openvino import opset15
    except ImportError as error:
        raise LeftOut(f"openvino does not load: {error!s:.200}") from None
    return openvino.Core(), opset15


def config(more: dict[str, str]) -> dict[str, str]:
    """One stream with all of torch's threads, for latency."""
    threads = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "NUM_STREAMS": "1"}
    return {"PERFORMANCE_HINT": "LATENCY", **threads, **more}


def shared(tensor: Tensor) -> Any:
    """An OpenVINO tensor on the memory of a torch tensor (float32 or bfloat16)."""
    import openvino

    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        raw = tensor.view(torch.int16).numpy()
        return openvino.Tensor(raw, openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


# --- the sides ---------------------------------------------------------------------------------


def fp32(layer: Layer) -> Side:
    """Float32 throughout."""
    wide = layer.weight.float()
    cost = layer.cost("fp32", float(wide.nbytes))
    return _side(layer, "openvino fp32", lambda op: _float(op, wide), FP32, cost, wide.nbytes)


def bf16(layer: Layer) -> Side:
    """bf16 products by the precision hint; x and y stay in the case's dtype."""
    wide = layer.weight.float()
    cost = layer.cost("bf16", 2.0 * wide.numel())
    return _side(layer, "openvino bf16", lambda op: _float(op, wide), BF16, cost, 2 * wide.numel())


def int8_dynamic(layer: Layer, group: int) -> Side:
    """int8 rows of W; x quantised at run time in groups of ``group`` (0: whole rows)."""
    more = {**FP32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group or layer.x.shape[1])}
    rounded = round_int8(layer.weight)
    name = f"openvino int8 {f'dq{group}' if group else 'rows'}"
    nbytes = rounded.values.nbytes
    return _side(layer, name, _rows(*rounded), more, layer.cost("int8", float(nbytes)), nbytes)


def int8_bf16(layer: Layer) -> Side:
    """int8 rows of W, products in bf16: weight-only."""
    more = {**BF16, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    rounded = round_int8(layer.weight)
    nbytes = rounded.values.nbytes
    cost = layer.cost("bf16", float(nbytes))
    return _side(layer, "openvino int8 bf16", _rows(*rounded), more, cost, nbytes)


def int8_static(layer: Layer) -> Side:
    """int8 rows of W, x by one scale that is known ahead (its true range here)."""
    low, high = float(layer.x.min()), float(layer.x.max())
    rounded = round_int8(layer.weight)
    nbytes = rounded.values.nbytes
    cost = layer.cost("int8", float(nbytes))
    name = "openvino int8 static"
    return _side(layer, name, _rows(*rounded), FP32, cost, nbytes, (low, high))


def int4(layer: Layer, weight: Int4Weight, hint: dict[str, str], group: int) -> Side:
    """int4 groups; x as it is (``group`` 0) or quantised at run time in groups of ``group``."""
    more = {**hint, "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}
    precision = hint["INFERENCE_PRECISION_HINT"].replace("f32", "fp32")
    name = f"openvino int4 {f'dq{group}' if group else precision}"
    cost = layer.cost("int8" if group else precision, float(weight.nbytes))
    return _side(layer, name, _nibbles(weight), more, cost, weight.nbytes)


# --- graphs ------------------------------------------------------------------------------------


def _float(op: Any, weight: Tensor) -> Any:
    return op.constant(weight.numpy())  # a copy: each model owns its weight


def _rows(values: Tensor, scale: Tensor) -> Weight:
    def build(op: Any) -> Any:
        wide = op.convert(op.constant(values.numpy()), "f32")
        return op.multiply(wide, op.constant(scale[:, None].numpy()))

    return build


def _nibbles(weight: Int4Weight) -> Weight:
    """u4 with zero point 8, the form that OpenVINO's kernels unpack (i4 is no faster)."""
    n, k = weight.values.shape
    flat = (weight.values.to(torch.int16) + 8).to(torch.uint8).reshape(-1)
    packed = flat[0::2] | (flat[1::2] << 4)

    def build(op: Any) -> Any:
        import numpy
        import openvino

        store = openvino.Tensor(openvino.Type.u4, [n, k // weight.group, weight.group])
        store.data[:] = packed.numpy().reshape(store.data.shape)
        wide = op.convert(op.constant(store, shared_memory=False), "f32")
        zero = op.convert(op.constant(numpy.full((1, 1, 1), 8, dtype=numpy.uint8)), "f32")
        scaled = op.multiply(op.subtract(wide, zero), op.constant(weight.scale[:, :, None].numpy()))
        return op.reshape(scaled, op.constant(numpy.array([n, k])), False)

    return build


def activate(op: Any, name: str, z: Any) -> Any:
    """The node of an activation.

    Raises:
        LeftOut: no such activation.
    """
    if name in GATED:
        halves = op.split(z, op.constant(1), 2)
        return op.multiply(activate(op, GATED[name], halves.output(0)), halves.output(1))
    if name == "relu2":
        positive = op.relu(z)
        return op.multiply(positive, positive)
    nodes: dict[str, Callable[[Any], Any]] = {
        "none": lambda z: z,
        "relu": op.relu,
        "gelu": lambda z: op.gelu(z, "erf"),
        "gelu_tanh": lambda z: op.gelu(z, "tanh"),
        "silu": op.swish,
        "sigmoid": op.sigmoid,
        "tanh": op.tanh,
    }
    if name not in nodes:
        raise LeftOut(f"openvino: no graph for {name}")
    return nodes[name](z)


def _model(layer: Layer, weight: Weight, span: tuple[float, float] | None) -> Any:
    import openvino

    _, op = core()
    kind = openvino.Type.bf16 if layer.x.dtype == torch.bfloat16 else openvino.Type.f32
    inputs = [op.parameter(list(layer.x.shape), kind)]
    x = inputs[0] if kind == openvino.Type.f32 else op.convert(inputs[0], "f32")
    if span is not None:
        low, high = (op.constant(edge, dtype=openvino.Type.f32) for edge in span)
        x = op.fake_quantize(x, low, high, low, high, 256)
    y = op.matmul(x, weight(op), False, True)
    if layer.bias is not None:
        y = op.add(y, op.constant(layer.bias.float()[None].numpy()))
    y = activate(op, layer.activation, y)
    if layer.residual is not None:
        inputs.append(op.parameter(list(layer.residual.shape), kind))
        more = inputs[1] if kind == openvino.Type.f32 else op.convert(inputs[1], "f32")
        y = op.add(y, more)
    if kind != openvino.Type.f32:
        y = op.convert(y, "bf16")
    return openvino.Model([y], inputs)


def _side(
    layer: Layer,
    name: str,
    weight: Weight,
    more: dict[str, str],
    cost: Any,
    nbytes: int,
    span: tuple[float, float] | None = None,
) -> Side:
    if layer.x.dtype not in (torch.float32, torch.bfloat16):
        raise LeftOut(f"openvino: float32 and bfloat16 only, got {layer.x.dtype}")
    device, _ = core()
    inputs = [t.contiguous() for t in (layer.x, layer.residual) if t is not None]

    def request(_: object) -> tuple[Any, Tensor, object]:
        model = device.compile_model(_model(layer, weight, span), "CPU", config(more))
        return bind(model, inputs)

    first = request(None)
    take = in_turn(copies(layer.case, first, nbytes, request))

    def call() -> Tensor:
        ready, out, _ = take()
        ready.infer(share_outputs=True)
        return out

    return Side(name, call, cost, name, own_pool=True)


def mlp_static(model: Any, x: Tensor, spans: list[tuple[float, float]], cost: Any) -> Side:
    """Linear, gelu, Linear in static int8; ``spans``: the range of what each layer takes.

    Raises:
        LeftOut: not installed.
    """
    device, op = core()
    import openvino

    first = op.parameter(list(x.shape), openvino.Type.f32)
    y: Any = first
    for part, span, name in zip((model[0], model[2]), spans, ("gelu", "none"), strict=True):
        low, high = (op.constant(edge, dtype=openvino.Type.f32) for edge in span)
        y = op.fake_quantize(y, low, high, low, high, 256)
        y = op.matmul(y, _rows(*round_int8(part.weight))(op), False, True)
        y = activate(op, name, op.add(y, op.constant(part.bias.detach()[None].numpy())))
    ready = device.compile_model(openvino.Model([y], [first]), "CPU", config(FP32))
    request, out, kept = bind(ready, [x.contiguous()])

    def call() -> Tensor:
        assert kept
        request.infer(share_outputs=True)
        return out

    name = "openvino int8 static"
    return Side(name, call, cost, name, own_pool=True)


def bind(model: Any, inputs: list[Tensor]) -> tuple[Any, Tensor, object]:
    """A request of a compiled model on torch's memory: (request, output, what must stay alive).

    The request holds addresses only, and reads what comes to stand there once a tensor is freed.
    """
    ready = model.create_infer_request()
    for place, tensor in enumerate(inputs):
        ready.set_input_tensor(place, shared(tensor))
    out = torch.empty(list(model.output(0).shape), dtype=inputs[0].dtype)
    ready.set_output_tensor(0, shared(out))
    return ready, out, inputs
