"""The BERT layer on OpenVINO and onnxruntime, as graphs built by hand.

Static int8 needs the range of every activation: they are recorded from the float32 model on the
case's own input, the best calibration there can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigops.benches import rivals_onnx, rivals_openvino
from bigops.benches.harness import Side
from bigops.benches.limits import Cost
from bigops.benches.rivals import round_int8

OPENVINO = ("fp32", "bf16", "int8 static", "int8 static bf16")
Price = Callable[[str, float], Cost]  # (unit, bytes of a weight) -> the layer's cost


@dataclass(frozen=True)
class Recorded:
    """An encoder layer, its input, and the range of the input of each of its linear parts."""

    model: Any
    x: Tensor  # [batch, tokens, hidden]
    spans: dict[str, tuple[float, float]]


def record(model: nn.Module, x: Tensor) -> Recorded:
    """Run the layer once and keep the ranges."""
    spans: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            spans[name] = (float(inputs[0].min()), float(inputs[0].max()))

        return see

    parts = [(n, p) for n, p in model.named_modules() if isinstance(p, nn.Linear)]
    handles = [part.register_forward_pre_hook(hook(name)) for name, part in parts]
    model(x)
    for handle in handles:
        handle.remove()
    return Recorded(model, x, spans)


# --- OpenVINO ----------------------------------------------------------------------------------


def openvino(layer: Recorded, form: str, cost: Price) -> Side:
    """A form of `OPENVINO`: the unit of the products, then that of all else (default float32).

    Raises:
        LeftOut: not installed.
    """
    device, op = rivals_openvino.core()
    import openvino as ov

    int8 = form.startswith("int8")
    hint = rivals_openvino.BF16 if form.endswith("bf16") else rivals_openvino.FP32
    model, (batch, tokens, hidden) = layer.model, layer.x.shape
    heads, size = model.heads, hidden // model.heads

    def whole(*numbers: int) -> Any:
        return op.constant(list(numbers), dtype=ov.Type.i64)

    def floats(value: Tensor) -> Any:
        return op.constant(value.detach().float().numpy())

    def linear(name: str, x: Any) -> Any:
        part = model.get_submodule(name)
        if int8:
            low, high = (op.constant(edge, dtype=ov.Type.f32) for edge in layer.spans[name])
            x = op.fake_quantize(x, low, high, low, high, 256)
            values, scale = round_int8(part.weight)
            weight = op.multiply(
                op.convert(op.constant(values.numpy()), "f32"), floats(scale[:, None])
            )
        else:
            weight = floats(part.weight)
        return op.add(op.matmul(x, weight, False, True), floats(part.bias[None, None]))

    def norm(name: str, x: Any) -> Any:
        part = model.get_submodule(name)
        y = op.mvn(x, whole(-1), True, part.eps, "INSIDE_SQRT")
        return op.add(op.multiply(y, floats(part.weight)), floats(part.bias))

    def split(x: Any) -> Any:  # [batch, heads, tokens, size]
        parted = op.reshape(x, whole(batch, tokens, heads, size), False)
        return op.transpose(parted, whole(0, 2, 1, 3))

    x = op.parameter([batch, tokens, hidden], ov.Type.f32)
    parts = [split(linear(name, x)) for name in ("query", "key", "value")]
    mixed = op.transpose(op.scaled_dot_product_attention(*parts), whole(0, 2, 1, 3))
    joined = op.reshape(mixed, whole(batch, tokens, hidden), False)
    first = norm("norm1", op.add(x, linear("out", joined)))
    inner = op.gelu(linear("ffn.0", first), "erf")
    last = norm("norm2", op.add(first, linear("ffn.2", inner)))
    ready = device.compile_model(ov.Model([last], [x]), "CPU", rivals_openvino.config(hint))
    request, out, kept = rivals_openvino.bind(ready, [layer.x.contiguous()])

    def call() -> Tensor:
        assert kept
        request.infer(share_outputs=True)
        return out

    price = cost("int8", 1) if int8 else cost(form, 2 if form == "bf16" else 4)
    name = f"openvino {form}"
    return Side(name, call, price, name, own_pool=True)


# --- onnxruntime -------------------------------------------------------------------------------


def onnxruntime(layer: Recorded, cost: Price) -> Side:
    """Static int8 products, float32 attention and norms by its fused operators.

    Raises:
        LeftOut: not installed.
    """
    graph = rivals_onnx.Graph()
    model, (batch, tokens, hidden) = layer.model, layer.x.shape
    rows, one = [batch * tokens, hidden], [batch, tokens, hidden]
    quantized: dict[str, tuple[str, list[str]]] = {}

    def linear(name: str, x: str) -> str:
        part = model.get_submodule(name)
        if x not in quantized:  # query, key and value read one quantised x
            known = graph.scale_and_zero(*layer.spans[name])
            quantized[x] = (graph.add("QuantizeLinear", x, *known), known)
        q, (step, zero) = quantized[x]
        values, scale = round_int8(part.weight)
        parts = [q, graph.constant(values.t()), step, graph.constant(scale), zero, ""]
        bias = graph.constant(part.bias.detach())
        return str(graph.add("MatMulIntegerToFloat", *parts, bias, domain=rivals_onnx.MICROSOFT))

    def norm(name: str, x: str, more: str) -> str:
        part = model.get_submodule(name)
        scale, offset = graph.constant(part.weight.detach()), graph.constant(part.bias.detach())
        return str(
            graph.add(
                "SkipLayerNormalization",
                x,
                more,
                scale,
                offset,
                domain=rivals_onnx.MICROSOFT,
                epsilon=part.eps,
            )
        )

    def shaped(x: str, dims: list[int]) -> str:
        return str(graph.add("Reshape", x, graph.constant(torch.tensor(dims))))

    x = shaped("x", rows)
    parts = [shaped(linear(name, x), one) for name in ("query", "key", "value")]
    mixed = graph.add(
        "MultiHeadAttention", *parts, domain=rivals_onnx.MICROSOFT, num_heads=model.heads
    )
    first = norm("norm1", x, linear("out", shaped(mixed, rows)))
    inner = graph.activate("gelu", linear("ffn.0", first))
    last = shaped(norm("norm2", first, linear("ffn.2", inner)), one)
    inputs = {"x": layer.x.contiguous()}
    session, binding, out, kept = rivals_onnx.bind(
        graph.serialized({"x": one}, last, one), inputs, one
    )

    def call() -> Tensor:
        assert kept
        session.run_with_iobinding(binding)
        return out

    name = "onnxruntime int8 static"
    return Side(name, call, cost("int8", 1), name, own_pool=True)
