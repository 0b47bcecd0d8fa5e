"""Layers with float Parameters answer from them as they are, whoever wrote them and how.

Many writes count no version: torch's fused optimisers, collectives, memory that is shared, numpy.
A layer that kept anything of an earlier call would answer as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor
from torch.nn.utils import vector_to_parameters

import bigops
from bigops.nn import (
    Fp8Linear,
    GatedMLP,
    Linear,
    LoRALinear,
    LowRankLinear,
    PackedLinear,
    PackedLowRankLinear,
    QuantLinear,
    QuantLowRankLinear,
    SparseLinear,
)
from tests.support import tolerance

K, N = 96, 80


def _sparse(dtype: torch.dtype, values: str, pattern: str) -> SparseLinear:
    dense = nn.Linear(K, N, dtype=dtype)
    return SparseLinear.from_linear(dense, None, pattern, values)


LAYERS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "Linear": lambda t: Linear(K, N, activation="gelu", dtype=t),
    "GatedMLP": lambda t: GatedMLP(K, N, bias=True, dtype=t),
    "LowRankLinear": lambda t: LowRankLinear(K, N, 70, dtype=t),
    "LoRALinear": lambda t: LoRALinear.from_linear(Linear(K, N, dtype=t), 4),
    "QuantLinear int8": lambda t: QuantLinear(K, N, dtype=t),
    "QuantLinear int4": lambda t: QuantLinear(K, N, dtype=t, bits=4, group=32),
    "QuantLowRankLinear": lambda t: QuantLowRankLinear(K, N, 70, dtype=t),
    "SparseLinear int8": lambda t: _sparse(t, "int8", "1x4"),
    "SparseLinear bf16 2:4": lambda t: _sparse(t, "bf16", "2:4"),
    "Fp8Linear": lambda t: Fp8Linear(K, N, dtype=t),
    "PackedLinear thawed": lambda t: PackedLinear(K, N, dtype=t).freeze().thaw(),
    "PackedLowRankLinear thawed": lambda t: PackedLowRankLinear(K, N, 70, dtype=t).freeze().thaw(),
}


# --- ways of writing -----------------------------------------------------------------------


def _each(write: Callable[[nn.Parameter], object]) -> Callable[[nn.Module], None]:
    def all_of(layer: nn.Module) -> None:
        with torch.no_grad():
            for parameter in layer.parameters():
                write(parameter)

    return all_of


def _step(optimiser: type[torch.optim.Optimizer], fused: bool = True) -> Callable[..., None]:
    def step(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimiser(layer.parameters(), lr=0.1, fused=fused).step()  # type: ignore[call-arg]

    return step


def _add_to_data(p: nn.Parameter) -> None:
    p.data += torch.randn_like(p)


def _replace_data(p: nn.Parameter) -> None:
    p.data = torch.randn_like(p)


def _bits(p: Tensor) -> Tensor:
    """The bits of a tensor as integers in the same memory: numpy has no bfloat16."""
    return p.detach().view(torch.int32 if p.dtype == torch.float32 else torch.int16)


def _numpy_view(p: nn.Parameter) -> None:
    array = _bits(p).numpy()
    array ^= array.dtype.type(-(1 << (8 * array.itemsize - 1)))  # the sign


def _shared_memory(layer: nn.Module) -> None:
    """As another process writes it, which has a tensor of its own in the same memory."""
    for parameter in layer.parameters():
        rebuild, arguments = reduce_tensor(parameter.data)
        rebuild(*arguments).neg_()


def _gather(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        dist.all_gather([parameter.data], torch.randn_like(parameter))


def _scatter(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        dist.scatter(parameter.data, [torch.randn_like(parameter)])


def _load(assign: bool) -> Callable[[nn.Module], None]:
    def load(layer: nn.Module) -> None:
        state = layer.state_dict()
        new = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
        layer.load_state_dict(new, assign=assign)

    return load


def _from_vector(layer: nn.Module) -> None:
    parameters = list(layer.parameters())
    size = sum(p.numel() for p in parameters)
    vector_to_parameters(torch.randn(size, dtype=parameters[0].dtype), parameters)


def _new_parameters(layer: nn.Module) -> None:
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, name, nn.Parameter(torch.randn_like(parameter)))


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "fused AdamW": _step(torch.optim.AdamW),
    "fused Adam": _step(torch.optim.Adam),
    "fused SGD": _step(torch.optim.SGD),
    "fused Adagrad": _step(torch.optim.Adagrad),
    "AdamW": _step(torch.optim.AdamW, fused=False),
    "data +=": _each(_add_to_data),
    "data =": _each(_replace_data),
    "data.neg_()": _each(lambda p: p.data.neg_()),
    "in place": _each(lambda p: p.neg_()),
    "set_": _each(lambda p: p.set_(torch.randn_like(p))),
    "numpy view": _each(_numpy_view),
    "dlpack": _each(lambda p: torch.from_dlpack(p.detach()).neg_()),
    "shared memory": _shared_memory,
    "all_gather": _gather,
    "scatter": _scatter,
    "load_state_dict": _load(assign=False),
    "load_state_dict assign": _load(assign=True),
    "vector_to_parameters": _from_vector,
    "new Parameters": _new_parameters,
}


@pytest.fixture(scope="module", autouse=True)
def _world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _check(make: Callable[[], nn.Module], write: Callable[[nn.Module], None], x: Tensor) -> None:
    """Hold what a layer gives after a write to a new layer that was loaded with the same."""
    layer = make().eval()
    if write is _shared_memory:
        layer.share_memory()  # before the first call
    modes = (torch.inference_mode, torch.no_grad)
    before = []
    for mode in modes:
        with mode():
            before.append(layer(x).clone())
    write(layer)
    fresh = make().eval()
    fresh.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
    for mode, old in zip(modes, before, strict=True):
        with mode():
            got = layer(x)
            assert torch.equal(got, fresh(x)), f"{mode.__name__}: not what was written"
        assert not torch.equal(got, old), f"{mode.__name__}: nothing was written"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_write_is_seen(name: str, way: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if (way, dtype) == ("fused SGD", torch.bfloat16):
            continue  # torch 2.13's writes no vector of it on a CPU
        torch.manual_seed(0)
        _check(lambda dtype=dtype: LAYERS[name](dtype), WAYS[way], torch.randn(5, K, dtype=dtype))


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith(("Q", "S", "F"))])
def test_numbers_of_recovery_are_those_after_freeze(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = LAYERS[name](dtype).eval(), torch.randn(5, K, dtype=dtype)
        with torch.no_grad():
            before = layer(x)
            layer.u.neg_() if "u" in layer._parameters else layer.weight.neg_()
            got = layer(x)
            assert not torch.equal(got, before)
            assert torch.equal(layer.freeze()(x), got)
            assert torch.equal(layer(x), got)


class _Keeps(Linear):
    """What must not be: a copy of the weight from the first call, as long as no version counts."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if getattr(self, "seen", None) != (self.weight._version, self.weight.data_ptr()):
            self.seen = (self.weight._version, self.weight.data_ptr())
            self.kept = self.weight.detach().clone()
        return bigops.fused_linear(x, self.kept, self.bias, residual, self.activation)


UNCOUNTED = {"fused AdamW", "fused SGD", "data +=", "numpy view", "shared memory", "all_gather"}


@pytest.mark.parametrize("way", sorted(UNCOUNTED))
def test_a_planted_copy_is_seen(way: str) -> None:
    with pytest.raises(AssertionError, match="not what was written"):
        _check(lambda: _Keeps(K, N), WAYS[way], torch.randn(5, K))


# --- adapters, as PEFT merges them -----------------------------------------------------------


def _low_rank(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return (torch.randn(n, 4) @ torch.randn(4, k) / 8).to(weight.dtype)


def _swapped_in() -> Linear:
    model = nn.Sequential(nn.Linear(K, N))
    bigops.fuse_(model)
    assert type(model[0]) is Linear
    return model[0]


BASES: dict[str, Callable[[], Linear]] = {
    "Linear": lambda: Linear(K, N),
    "fuse_": _swapped_in,
    "GatedMLP": lambda: GatedMLP(N, K, N).down_proj,
    "unpack_": lambda: PackedLinear(K, N).freeze().unpacked(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_adapters_merged_by_data_answer(base: str, dtype: torch.dtype) -> None:
    """Merge, unmerge and hot swap, an answer in inference mode after each."""
    layer = BASES[base]().to(dtype).eval()
    x = torch.randn(4, layer.in_features, dtype=dtype)

    def check() -> None:
        bias = None if layer.bias is None else layer.bias.double()
        w64 = layer.weight.detach().double()
        scale = x.abs().double() @ w64.abs().t()
        ref64 = nn.functional.linear(x.double(), w64, bias)
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                tolerance.check(layer(x), ref64, plain, scale + ref64.abs())

    first, second = _low_rank(layer.weight), _low_rank(layer.weight)
    check()
    layer.weight.data += first
    check()
    layer.weight.data -= first
    check()
    layer.weight.data += second  # hot swap
    check()
    layer.weight.data = layer.weight.data - second
    check()
