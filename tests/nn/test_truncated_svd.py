"""Singular values by the Gram matrix against LAPACK's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigops.nn import LowRankLinear
from bigops.nn.truncated_svd import EXCESS, ROUNDING, SMALL, rank_of, truncated_svd

EPS = torch.finfo(torch.float64).eps


def _with(values: Tensor, n: int, k: int) -> Tensor:
    """A float64 matrix [n, k] with these singular values."""
    left = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(k, len(values), dtype=torch.float64)).Q
    return left * values @ right.t()


def _cases() -> dict[str, Tensor]:
    torch.manual_seed(0)
    steep = torch.logspace(0, -14, 160, dtype=torch.float64)
    falling = torch.logspace(0, -3, 160, dtype=torch.float64)
    return {
        "square": torch.randn(160, 160),
        "wide": torch.randn(150, 400),
        "tall": torch.randn(400, 150),
        "ragged": torch.randn(131, 257) * 1e-3,
        "bf16": torch.randn(160, 200).bfloat16(),
        "fp16": torch.randn(200, 160).half(),
        "float64": torch.randn(160, 160, dtype=torch.float64),
        "ill-conditioned": _with(steep, 160, 200).float(),
        "ill-conditioned float64": _with(steep, 200, 160),
        "rank-deficient": (torch.randn(160, 9) @ torch.randn(9, 170)),
        "rank-deficient float64": _with(torch.ones(9, dtype=torch.float64), 160, 170),
        "equal values": _with(torch.ones(150, dtype=torch.float64), 150, 150).float(),
        "falling": _with(falling, 160, 160).float(),
        "huge": torch.randn(140, 140) * 1e37,
        "huge float64": torch.randn(140, 140, dtype=torch.float64) * 1e300,
        "tiny float64": torch.randn(140, 140, dtype=torch.float64) * 1e-300,
        "zero": torch.zeros(140, 150),
        "small": torch.randn(5, 7),
        "one row": torch.randn(1, 300),
        "empty": torch.zeros(0, 7),
    }


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_error_and_values_are_those_of_the_svd(name: str, share: float) -> None:
    weight = CASES[name]
    most = min(weight.shape)
    rank = max(round(share * most), min(most, 9) if share else 0)
    got = truncated_svd(weight, rank)
    w = weight.double()
    size = float(w.abs().max()) if w.numel() else 1.0
    w = w / (size or 1.0)
    exact = torch.linalg.svdvals(w)
    norm = float(exact.square().sum().sqrt())
    eps = torch.finfo(weight.dtype).eps
    assert (got.left.shape, got.right.shape) == ((weight.shape[0], rank), (rank, weight.shape[1]))
    # Weyl: a singular value moves by no more than the perturbation, here a Gram matrix's rounding
    values = got.values / (size or 1.0)
    assert bool((values.diff() <= 0).all())
    off = (values - exact[:rank]).abs()
    resolved = (
        0.0 if got.fallback or most <= SMALL else (len(exact) * EPS) ** 0.5 * float(exact.max())
    )
    assert (float(off.max()) if rank else 0.0) <= resolved + ROUNDING * EPS * norm
    error = float(torch.linalg.matrix_norm(w - got.left * values @ got.right)) if w.numel() else 0.0
    least = float(exact[rank:].square().sum().sqrt())
    slack = len(exact) * EPS * norm  # of the reference itself
    assert error <= (1 + EXCESS) * least + ROUNDING * eps * norm + slack
    eye = torch.eye(rank, dtype=torch.float64)
    short = got.left if weight.shape[0] <= weight.shape[1] else got.right.t()
    assert float((short.t() @ short - eye).abs().sum()) <= most * ROUNDING * EPS * max(rank, 1)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("empty",)])
@pytest.mark.parametrize("energy", [0.3, 0.99])
def test_rank_by_energy_is_that_of_the_svd(name: str, energy: float) -> None:
    weight = CASES[name]
    squares = torch.linalg.svdvals(weight.double() / (weight.double().abs().max() or 1)).square()
    got, want = truncated_svd(weight, energy=energy).rank, rank_of(squares, energy)
    if name != "equal values":  # there the share steps over 0.3 and 0.9 at a rounding
        assert got == want
    assert abs(got - want) <= 1


def test_which_way_is_taken_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert truncated_svd(CASES["square"], 20).fallback == ""
    assert truncated_svd(CASES["tall"], energy=0.5).fallback == ""
    steep = CASES["ill-conditioned float64"]
    assert "Gram matrix leaves an error" in truncated_svd(steep, 120).fallback
    assert "leaves less out" in truncated_svd(CASES["square"], energy=1.0).fallback
    real, asked = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", asked.append)
    truncated_svd(CASES["square"], 20, exact=True)
    truncated_svd(CASES["small"], 2)
    assert not asked

    def crooked(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = real(gram)
        return values, torch.linalg.qr(vectors + 1e-2 * torch.randn_like(vectors)).Q

    monkeypatch.setattr(torch.linalg, "eigh", crooked)
    again = truncated_svd(CASES["falling"], 20)
    assert "Gram matrix leaves an error" in again.fallback


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(150, 200), (200, 150)])
def test_a_layer_of_either_way_has_the_same_error(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(*shape).to(dtype)
    weight = linear.weight.detach().double()
    fast, exact = (LowRankLinear.from_linear(linear, 30, exact=e) for e in (False, True))
    errors = [float((layer.to_dense().double() - weight).norm()) for layer in (fast, exact)]
    rounding = ROUNDING * torch.finfo(dtype).eps * float(weight.norm())
    assert abs(errors[0] - errors[1]) <= EXCESS * errors[1] + rounding
    assert fast.u.is_contiguous()
    assert fast.v.is_contiguous()
