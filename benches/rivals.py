"""The sides of a case that stock torch can take: eager, torch.compile, oneDNN, int8, int4, CSR.

`families` lists all makers of one number format, those of other packages too. Nothing here is a
dependency of bigops. Each maker raises `LeftOut` with the reason where its provider cannot take
part; private entry points of torch are asked for by name and guarded.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.backend import machine
from bigops.benches.harness import Case, LeftOut, Side, clones, compiled, copies, in_turn
from bigops.benches.limits import Cost

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
# oneDNN's name of the activation and its algorithm argument
_ONEDNN = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "sigmoid": ("sigmoid", ""),
    "tanh": ("tanh", ""),
}
# The default engine of x86 chooses by shape; fbgemm and onednn are its two halves.
INT8_ENGINES = ("fbgemm", "onednn")

Linear = Callable[..., Tensor]


@dataclass(frozen=True)
class Layer:
    """What a case asks of every maker: ``y = act(x W^T + bias) + residual``.

    x is [M, K], weight [N, K] (gated activations: [2N, K]), bias [N], residual [M, N].
    """

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    residual: Tensor | None = None

    def cost(self, unit: str, weight_bytes: float) -> Cost:
        """The cost of all products on one unit, with a weight of so many bytes."""
        (m, k), n = self.x.shape, self.weight.shape[0]
        moved = self.x.element_size() * m * (k + n)
        return Cost(unit, 2.0 * m * k * n, weight_bytes + moved)

    def finish(self, y: Tensor) -> Tensor:
        """Activation and residual by eager torch, for a provider that only multiplies."""
        if self.activation in GATED:
            gate, up = y.chunk(2, dim=-1)
            y = PLAIN[GATED[self.activation]](gate) * up
        elif self.activation != "none":
            y = PLAIN[self.activation](y)
        return y if self.residual is None else y + self.residual


class Int8Weight(NamedTuple):
    """Row n of a weight is ``scale[n] * values[n]``; one rounding for all int8 rivals."""

    values: Tensor  # [N, K] int8
    scale: Tensor  # [N] float32


def round_int8(weight: Tensor) -> Int8Weight:
    """One symmetric scale per row, as all dynamic int8 providers have it."""
    wide = weight.float()
    scale = (wide.abs().amax(1) / 127).clamp_min(1e-12)
    return Int8Weight((wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale)


class Int4Weight(NamedTuple):
    """A weight in 4 bits: entry ``[n, k]`` is ``values[n, k] * scale[n, k // group]``.

    The rounding belongs to the case: all sides get the same integers, and the reference is of
    ``to_dense()``, so that a row's error is what its provider adds.
    """

    values: Tensor  # [N, K] int8, -8..7
    scale: Tensor  # [N, K / group] float32, exact in bf16, which several providers store

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that no provider can avoid: the nibbles, and the scales in 2 bytes each."""
        return self.values.numel() // 2 + 2 * self.scale.numel()

    def to_dense(self) -> Tensor:
        """The matrix [N, K] in float32."""
        return self.values.float() * self.scale.repeat_interleave(self.group, dim=1)


def round_int4(weight: Tensor, group: int) -> Int4Weight:
    """Round to the nearest in symmetric groups of ``group`` along K.

    Raises:
        ValueError: K is no multiple of the group.
    """
    n, k = weight.shape
    if k % group:
        raise ValueError(f"group: expected a divisor of K = {k}, got {group}")
    parts = weight.float().view(n, k // group, group)
    scale = (parts.abs().amax(2) / 7).clamp_min(1e-12).bfloat16().float()
    values = (parts / scale[:, :, None]).round().clamp(-8, 7)
    return Int4Weight(values.view(n, k).to(torch.int8), scale)


def eager(activation: str, has_residual: bool) -> Linear:
    """``f(x, weight, bias[, residual])`` as a user writes it, with nothing around the calls."""
    if activation in GATED:
        inner = PLAIN[GATED[activation]]

        def gated(x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None = None) -> Tensor:
            gate, up = F.linear(x, w, b).chunk(2, dim=-1)
            y = inner(gate) * up
            return y if r is None else y + r

        return gated
    if activation == "none" and not has_residual:
        return F.linear
    if activation == "none":
        return lambda x, w, b, r: F.linear(x, w, b) + r
    plain = PLAIN[activation]
    if has_residual:
        return lambda x, w, b, r: plain(F.linear(x, w, b)) + r
    return lambda x, w, b: plain(F.linear(x, w, b))


def compiled_side(function: Callable[..., Any], call: Callable[[Any], Any], cost: Cost) -> Side:
    """torch.compile with its default back end; ``call(f)`` runs the compiled ``f`` once."""
    ready = compiled(function)
    return Side("torch.compile", lambda: call(ready), cost, "inductor")


def dense_compiled(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, function: Linear, cost: Cost
) -> Side:
    """torch.compile of the dense layer that a compressed one replaces."""
    take = in_turn(clones(case, weight))
    return compiled_side(function, lambda f: f(x, take(), bias), cost)


def csr(case: Case, x: Tensor, weight: Tensor, bias: Tensor, activation: str, cost: Cost) -> Side:
    """torch's CSR product, ``(W x^T)^T``, which is MKL's inspector-executor on x86."""
    nbytes = 8 * int(weight.count_nonzero())
    take = in_turn(copies(case, _to_csr(weight), nbytes, lambda _: _to_csr(weight)))
    plain = PLAIN.get(activation)
    columns = x.t()

    def call() -> Tensor:
        y = torch.mm(take(), columns).t() + bias
        return y if plain is None else plain(y)

    return Side("torch csr", call, cost, "aten csr")


def _to_csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "beta state", on every first use
        full = weight.to_sparse_csr()
        # the MKL that torch links takes 32-bit indices
        rows, columns = full.crow_indices().int(), full.col_indices().int()
        return torch.sparse_csr_tensor(rows, columns, full.values(), full.shape)


def plugin_side(
    provider: str,
    function: Callable[..., Any],
    case: Case,
    x: Tensor,
    weight: Tensor,
    rest: tuple[Tensor | None, ...],
    cost: Cost,
) -> Side:
    """zentorch or OpenVINO through the back end they register with torch.compile.

    They get weights of their own: zentorch rewrites a weight in place.

    Raises:
        LeftOut: the package is not installed, or refuses this torch.
    """
    if importlib.util.find_spec(provider) is None:
        raise LeftOut(f"{provider} is not installed")
    try:
        importlib.import_module({"openvino": "openvino.torch"}.get(provider, provider))
    except ImportError as error:
        raise LeftOut(f"{provider} does not load: {error!s:.200}") from None
    own = clones(case, weight.clone())
    if provider == "zentorch":
        keep_for_zentorch(case, own)
    take, ready = in_turn(own), compiled(function, provider)
    name = f"{provider} compile"
    return Side(name, lambda: ready(x, take(), *rest), cost, name, own_pool=True)


_kept: list[tuple[Case, list[Tensor]]] = []


def keep_for_zentorch(case: Case, tensors: list[Tensor]) -> None:
    """Keep weights alive as long as zentorch may know their addresses.

    It keys its packs by address, and a reused address gave wrong results. The packs of earlier
    cases are dropped together with their weights: kept for ever, a whole run needs tens of GB.
    """
    if _kept and any(old is not case for old, _ in _kept):
        torch.ops.zentorch.zentorch_clear_weight_cache()
        _kept.clear()
    _kept.append((case, tensors))


def onednn_prepacked(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, cost: Cost
) -> Side:
    """oneDNN with weights packed ahead, as it sits inside stock torch (fp32 and bf16, inference).

    Raises:
        LeftOut: this torch has no such op, or the activation or dtype is not served.
    """
    if activation not in _ONEDNN:
        raise LeftOut(f"onednn: no {activation} in one call")
    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if pack is None or linear is None or not torch.backends.mkldnn.is_available():
        raise LeftOut("onednn: this torch has no prepacked linear")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise LeftOut(f"onednn: the prepacked linear refuses {weight.dtype}")
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise LeftOut("onednn: the prepacked linear takes no bfloat16 on this CPU")
    name, algorithm = _ONEDNN[activation]
    nbytes = weight.numel() * weight.element_size()
    # packed from the plain weight each time: a pack cannot be copied
    take = in_turn(
        copies(case, pack(weight, x.shape[0]), nbytes, lambda _: pack(weight, x.shape[0]))
    )
    return Side(
        "onednn",
        lambda: linear(x, take(), bias, name, [], algorithm),
        cost,
        "onednn prepacked",
    )


def dynamic_int8(
    case: Case,
    engine: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    cost: Cost,
) -> Side:
    """torch's dynamic int8 linear (one scale a call for x, one a channel for W) and activation.

    Raises:
        LeftOut: the engine is not in this torch, or x is no float32.
    """
    provider = f"torch int8 {engine}"
    if engine not in torch.backends.quantized.supported_engines:
        raise LeftOut(f"{provider}: the engine is not in this torch")
    if x.dtype != torch.float32:
        raise LeftOut(f"{provider}: float32 only")
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-12).double()
    zero_point = torch.zeros_like(scale, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated; still the best in torch
        quantized = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.qint8)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine  # read by prepack; the pack then keeps its engine
    try:
        packs = copies(
            case,
            torch.ops.quantized.linear_prepack(quantized, bias),
            weight.numel(),
            lambda _: torch.ops.quantized.linear_prepack(quantized, bias),
        )
    finally:
        torch.backends.quantized.engine = before
    take = in_turn(packs)
    # Without VNNI both engines add pairs of products in 16 bits, which 8-bit activations overflow.
    reduce_range = "avx512vnni" not in _isas()

    def linear() -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, take(), reduce_range)

    if activation == "none":
        return Side(provider, linear, cost, provider)
    layer = Layer(case, x, weight, bias, activation)
    return Side(provider, lambda: layer.finish(linear()), cost, provider)


def _isas() -> list[str]:
    return list(machine.extension.isas()) if machine.extension else []


def eager_side(
    case: Case,
    x: Tensor,
    weight: Tensor,
    rest: tuple[Tensor | None, ...],
    function: Linear,
    cost: Cost,
) -> Side:
    """The case as plain torch calls; every ratio is against this."""
    take = in_turn(clones(case, weight))
    return Side("eager", lambda: function(x, take(), *rest), cost, "aten")


def int8_weight_only(layer: Layer) -> Side:
    """torch's ``_weight_int8pack_mm``: int8 rows, activations as they are (bf16).

    Raises:
        LeftOut: this torch has no such op, or sizes that it does not take.
    """
    multiply = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
    if multiply is None:
        raise LeftOut("torch int8pack: this torch has no such op")
    n, k = layer.weight.shape
    if n % 32 or k % 32:  # it reads whole vectors: 8 x 8 ended in a segmentation fault
        raise LeftOut(f"torch int8pack: no weight of {n} x {k}, only multiples of 32")
    rounded = round_int8(layer.weight)
    # with fp32 activations it runs at 2 GFLOP/s; through bf16 at 100
    scale, bias = rounded.scale.bfloat16(), layer.bias
    dtype = layer.x.dtype
    take = in_turn(clones(layer.case, rounded.values))

    def call() -> Tensor:
        y = multiply(layer.x.bfloat16(), take(), scale).to(dtype)
        return layer.finish(y if bias is None else y + bias)

    cost = layer.cost("bf16", float(rounded.values.nbytes))
    return Side("torch int8pack", call, cost, "aten int8pack")


def int4_weight_only(layer: Layer, weight: Int4Weight) -> Side:
    """torch's ``_weight_int4pack_mm_for_cpu``: int4 groups, activations in bf16.

    Raises:
        LeftOut: this torch has no such op, or the group is not one that it serves.
    """
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    multiply = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
    if pack is None or multiply is None:
        raise LeftOut("torch int4pack: this torch has no such op")
    if weight.group not in (32, 64, 128, 256):
        raise LeftOut(f"torch int4pack: no groups of {weight.group}")
    unsigned = weight.values.int() + 8
    # [K / group, N, 2]: the scale, and the value that the middle of the range stands for
    scale = weight.scale.t().bfloat16()
    scales = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()
    dtype, group, bias = layer.x.dtype, weight.group, layer.bias
    take = in_turn(clones(layer.case, pack(unsigned, 1)))

    def call() -> Tensor:
        # with fp32 activations it falls to a slow form
        y = multiply(layer.x.bfloat16(), take(), group, scales).to(dtype)
        return layer.finish(y if bias is None else y + bias)

    return Side("torch int4pack", call, layer.cost("bf16", weight.nbytes), "aten int4pack")
