"""torch.set_default_dtype and set_default_device reach into no layer that says its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bigops
from bigops.nn import LowRankLinear, QLoRALinear, QuantLinear
from tests.nn.stored_cases import LAYERS, K, N


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def through(kind: str) -> list[torch.Tensor]:
    """What a layer of float32 goes through, and what is left of it."""
    torch.manual_seed(0)
    layer = (
        LAYERS[kind]().float() if kind in LAYERS else LowRankLinear(K, N, 16, dtype=torch.float32)
    )
    x = torch.randn(6, K, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = [layer(x)]
        if isinstance(layer, nn.Linear):
            found += [layer.weight.clone(), QLoRALinear.from_linear(layer, 2)(x)]
        if hasattr(layer, "dense_weight"):
            found.append(layer.dense_weight())
    return [*found, *layer.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [k for k in [*LAYERS, "factors"] if not k.startswith("packed")])
def test_the_default_dtype_reaches_into_nothing(kind: str, dtype: torch.dtype) -> None:
    want = [t.dtype for t in through(kind)]
    with default(dtype):
        got = [t.dtype for t in through(kind)]
    assert got == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "plan",
    [
        bigops.Int8(activations="static"),
        bigops.Sparse(pattern="2:4"),
        bigops.Sparse(0.8) + bigops.Int8(activations="static"),
        bigops.LowRank(8) + bigops.Int8(),
        bigops.Fp8(),
    ],
    ids=str,
)
def test_compressed_under_a_default_dtype(plan: object, dtype: torch.dtype) -> None:
    """The same numbers, of a model that has a dtype of its own."""

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 96, dtype=torch.float32), nn.ReLU(), nn.Linear(96, 8, dtype=torch.float32)
        )
        x = torch.randn(32, 64, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
        bigops.compress_(model.eval(), plan, data=[x], keep="all")  # type: ignore[arg-type]
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]

    want = run()
    with default(dtype):
        got = run()
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_a_default_device_is_where_layers_are_made() -> None:
    with torch.device("meta"):
        layer = QuantLinear(K, N, activations="static", symmetric=False)
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
        moved = QuantLinear(K, N, device="cpu").freeze()
    assert {t.device.type for t in moved.parameters()} == {"cpu"}
    assert moved(torch.randn(2, K)).shape == (2, N)
