"""The other sides of a case: eager torch, torch.compile, and the best that is installed.

Nothing here is a dependency of bigops. Each maker raises `LeftOut` with the reason where its
provider cannot take part; private entry points of torch are asked for by name and guarded.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.benches.harness import Case, LeftOut, Side, clones, compiled, copies, in_turn
from bigops.benches.limits import Cost

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
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


def eager(activation: str, has_residual: bool) -> Linear:
    """``f(x, weight, bias[, residual])`` as a user writes it, with nothing around the calls."""
    if activation in _GATED:
        inner = _PLAIN[_GATED[activation]]

        def gated(x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None = None) -> Tensor:
            gate, up = F.linear(x, w, b).chunk(2, dim=-1)
            y = inner(gate) * up
            return y if r is None else y + r

        return gated
    if activation == "none" and not has_residual:
        return F.linear
    if activation == "none":
        return lambda x, w, b, r: F.linear(x, w, b) + r
    plain = _PLAIN[activation]
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
    plain = _PLAIN.get(activation)
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


_never_freed: list[Tensor] = []


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

    They get weights of their own that are never freed: zentorch rewrites a weight in place and
    keys its packs by address (a reused address gave wrong results).

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
    _never_freed.extend(own)
    take, ready = in_turn(own), compiled(function, provider)
    return Side(provider, lambda: ready(x, take(), *rest), cost, provider, own_pool=True)


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
    linear = torch.ops.quantized.linear_dynamic
    plain = _PLAIN.get(activation)
    if plain is None:
        return Side(provider, lambda: linear(x, take()), cost, provider)
    return Side(provider, lambda: plain(linear(x, take())), cost, provider)


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
