"""8-bit block-wise states and stochastic rounding: the map, the codes, the random bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bigops.ops.fused_adamw import fused_adamw, fused_sgd, states
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_the_paper(signed: bool) -> None:
    values = states.dynamic_map(signed)
    assert values.shape == (256,)
    assert bool((values.diff() > 0).all())
    assert values[-1] == 1
    assert (values == 0).nonzero().item() == (127 if signed else 0)
    # Every decade from 1e-6 on has its share: 2^d equal parts of [0.1, 1] (signed: on each side).
    for d in range(7):
        low, high = 10.0 ** (d - 7), 10.0 ** (d - 6)
        inside = values[(values > low) & (values < high)]
        parts = (1 if signed else 2) << d
        assert len(inside) == parts
        assert math.isclose(inside[0].item(), high * (0.1 + 0.45 / parts), rel_tol=1e-6)
    if signed:
        assert torch.equal(values[:127], -values[128:255].flip(0))


def magnitudes() -> Tensor:
    """Values near every decision: each code, each middle and its neighbours, beyond both ends."""
    half = states.dynamic_map(False)
    middles = (half[1:] + half[:-1]) / 2
    short = (middles.view(torch.int32) & -256).view(torch.float32)  # as they are compared with
    middles = torch.cat([middles, short])
    near = [torch.nextafter(middles, torch.tensor(s)) for s in (0.0, 2.0)]
    more = torch.logspace(-12, 0, 3000)
    both = torch.cat([states.dynamic_map(True)[127:], half, middles, *near, more, -more])
    return torch.cat([both, -both])


def encoded_by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """A first SGD step without dampening leaves the gradient, encoded, in the buffer."""
    codes = torch.zeros(x.numel(), dtype=torch.uint8)
    scales = torch.zeros(states.scales_shape(x.shape))
    fused_sgd(
        [torch.zeros_like(x)],
        [x],
        [codes],
        lr=0.0,
        momentum=0.5,
        first_step=True,
        momentum_scales=[scales],
    )
    return codes, scales


@needs_extension
@pytest.mark.parametrize("level", ISAS)
def test_kernels_encode_as_the_reference(level: str) -> None:
    x = magnitudes()
    pad = (-len(x)) % 255
    blocks = torch.cat([x, x.new_zeros(pad)]).reshape(-1, 255)
    x = torch.cat([blocks, blocks.new_ones(len(blocks), 1)], 1).reshape(-1)[:-3]  # absmax 1
    with isa(level), expect("fused_sgd.f32.8bit"):
        codes, scales = encoded_by_kernel(x)
    want, want_scales = states.encode(x, True)
    assert torch.equal(codes, want)
    assert torch.equal(scales, want_scales)
    # exp_avg_sq = (1 - 0) g^2 with beta2 = 0
    squares = x.abs()
    grads = squares.sqrt()
    codes, scales = torch.zeros(len(x), dtype=torch.uint8), torch.zeros(len(want_scales))
    rest = [torch.full((len(x),), 127, dtype=torch.uint8)], [codes], [torch.zeros(())]
    with isa(level), expect("fused_adamw.f32.8bit"):
        fused_adamw(
            [torch.zeros(len(x))],
            [grads],
            *rest,
            lr=0.0,
            betas=(0.9, 0.0),
            exp_avg_scales=[scales.clone()],
            exp_avg_sq_scales=[scales],
        )
    want, want_scales = states.encode(grads * grads, False)
    assert torch.equal(codes, want)
    assert torch.equal(scales, want_scales)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_and_above_zero_never_become_zero(signed: bool) -> None:
    x = magnitudes() if signed else magnitudes().abs()
    x = torch.stack([x, torch.ones_like(x)], 1)  # absmax 1
    x = x.repeat(1, 128).reshape(-1)
    codes, scales = states.encode(x, signed)
    assert bool((scales == 1).all())
    values = states.dynamic_map(signed)
    out = states.decode(codes, scales, signed)
    best = (values[:, None] - x[None, ::256]).abs().amin(0)
    small = (x[::256] > 0) & (out[::256] == values[1])
    error = (out[::256] - x[::256]).abs()
    tie = 2.0**-14 * x[::256].abs()  # middles have 15 bits of mantissa
    assert bool(((error <= best + tie) | (small & (not signed))).all())
    if not signed:
        assert bool((out[x > 0] > 0).all())


@needs_extension
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
def test_zeros_and_any_length(n: int) -> None:
    codes, scales = encoded_by_kernel(torch.zeros(n)) if n else states.encode(torch.zeros(0), True)
    assert codes.shape == (n,)
    assert torch.equal(states.decode(codes, scales, True), torch.zeros(n))
    x = torch.randn(n)
    want, want_scales = states.encode(x, True)
    assert want_scales.shape == (-(-n // 256),)
    error = (states.decode(want, want_scales, True) - x).abs()
    widest = 0.9 / 64  # the widest gap of the signed map
    assert bool((error <= want_scales.repeat_interleave(256)[:n] * widest / 2 * 1.001).all())


@needs_extension
def test_a_nan_stays_visible() -> None:
    x = torch.randn(600)
    x[300] = float("nan")
    codes, scales = encoded_by_kernel(x)
    assert scales.isnan().tolist() == [False, True, False]
    assert bool(states.decode(codes, scales, True)[256:512].isnan().all())


# stochastic rounding -------------------------------------------------------------------------


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""

    def words(counter: list[int], seed: int) -> list[str]:
        out = states.philox(tuple(torch.tensor([c]) for c in counter), seed)  # type: ignore
        return [f"{int(w):08x}" for w in out]

    assert words([0] * 4, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 0xFFFFFFFF
    assert words([ones] * 4, (ones << 32) | ones) == [
        "408f276d",
        "41c83b0e",
        "a20bc7c6",
        "6d5451fd",
    ]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    key = (0x299F31D0 << 32) | 0xA4093822
    assert words(pi, key) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def rounded_by_kernel(x: Tensor, seed: int, stream: int, step: int) -> Tensor:
    """x + 0 in bfloat16: a step of SGD from 0 with the gradient -x."""
    param = torch.zeros(x.shape, dtype=torch.bfloat16)
    fused_sgd([param], [-x], lr=1.0, streams=[stream], seed=seed, rounding_step=step)
    return param


@needs_extension
@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize(("seed", "stream", "step"), [(0, 0, 0), (1 << 40 | 7, 3, 12), (-5, 1, 2)])
def test_kernels_round_as_the_reference(level: str, seed: int, stream: int, step: int) -> None:
    x = torch.randn(1003) * 10.0 ** torch.randint(-30, 30, (1003,))
    x[3:6] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    with isa(level), expect("fused_sgd.bf16.fused"):
        out = rounded_by_kernel(x, seed, stream, step)
    want = states.round_stochastic(0 - 1.0 * -x, seed, stream, step)
    assert torch.equal(out.view(torch.int16)[6:], want.view(torch.int16)[6:])
    assert torch.equal(out[3:5], x[3:5].bfloat16())
    assert out[5].isnan()


def test_rounding_is_unbiased_and_between_the_neighbours() -> None:
    x = torch.full((1 << 16,), 1 + 0.3 * 2**-7)  # three tenths of the way to the next bfloat16
    out = states.round_stochastic(x, 11, 0, 0).double()
    assert set(out.tolist()) == {1.0, 1 + 2**-7}
    share = (out > 1).double().mean().item()
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / len(x))  # five standard deviations
    assert not torch.equal(out, states.round_stochastic(x, 11, 0, 1).double())
    assert not torch.equal(out, states.round_stochastic(x, 11, 1, 0).double())
    assert not torch.equal(out, states.round_stochastic(x, 12, 0, 0).double())


def test_what_bfloat16_holds_stays() -> None:
    x = torch.randn(1000).bfloat16()
    assert torch.equal(states.round_stochastic(x.float(), 3, 1, 4), x)
