"""Blocks of 8-bit states by rows, and parts of a tensor: the bits of the whole on every kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigops import fused_adamw, fused_sgd
from bigops.ops.fused_adamw import states
from tests.support import tolerance
from tests.support.backends import CPU, HOSTRUN, REFERENCE, TRITON, Way, reachable
from tests.support.cases.optimizer import Problem, round_roots
from tests.support.kernels_ran import needs_extension, threads

pytestmark = needs_extension


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.mark.parametrize(
    ("shape", "leading", "scales"),
    [
        ((), 0, (1,)),
        ((0,), 0, (0,)),
        ((5000,), 0, (20,)),
        ((8, 300), 1, (8, 2)),
        ((8, 16), 1, (8, 1)),
        ((4, 8, 300), 2, (4, 8, 2)),
        ((4, 8, 30), 1, (4, 1)),
        ((512, 512, 3, 3), 1, (512, 18)),
        ((3, 0, 4), 1, (3, 0)),
    ],
)
def test_what_a_row_is(shape: Any, leading: int, scales: Any) -> None:
    assert states.leading_of(shape) == leading
    assert states.scales_shape(shape) == scales
    codes, absmax = states.encode(torch.zeros(shape), True)
    assert absmax.shape == scales
    assert states.fits(absmax, shape)
    assert states.decode(codes, absmax, True).shape == shape


def test_no_block_crosses_a_row() -> None:
    x = torch.ones(3, 300)
    x[1] = 1000.0
    codes, absmax = states.encode(x, True)
    assert absmax.tolist() == [[1, 1], [1000, 1000], [1, 1]]
    assert torch.equal(states.decode(codes, absmax, True), x)
    _, in_one_row = states.encode(x, True, 0)
    assert in_one_row.tolist() == [1, 1000, 1000, 1]


class Part:
    """A slice of a problem of one matrix, in memory of its own, and its place in the whole."""

    def __init__(self, whole: Problem, rows: slice, columns: slice) -> None:
        def cut(t: Tensor) -> Tensor:
            return t[rows, columns].clone()

        blocks = slice(columns.start // 256, -(-columns.stop // 256))
        self.param, self.first, self.second = (
            cut(held[0]) for held in (whole.params, whole.first, whole.second)
        )
        self.scales = [
            held[0][rows, blocks].clone() for held in (whole.first_scales, whole.second_scales)
        ]
        self.step = whole.steps[0].clone()
        self.cut, self.blocks, self.rows = cut, blocks, rows
        width = whole.params[0].shape[1]
        self.place = rows.start * width + columns.start, self.param.shape[1], width
        if self.param.shape[1] == width:
            self.place = self.place[0], self.param.numel(), self.param.numel()

    def move(self, grad: Tensor, coded: bool, step: int) -> None:
        scales = {"exp_avg_scales": self.scales[:1], "exp_avg_sq_scales": self.scales[1:]}
        fused_adamw(
            [self.param],
            [grad],
            [self.first],
            [self.second],
            [self.step],
            lr=1e-2,
            streams=[3],
            seed=5,
            rounding_step=step,
            places=[self.place],
            **(scales if coded else {}),
        )

    def hold(self, whole: Problem, coded: bool) -> None:
        """The same bits as the whole has there."""
        pairs = [
            (self.param, whole.params[0]),
            (self.first, whole.first[0]),
            (self.second, whole.second[0]),
        ]
        assert all(torch.equal(mine, self.cut(theirs)) for mine, theirs in pairs)
        if coded:
            for mine, theirs in zip(
                self.scales, (whole.first_scales[0], whole.second_scales[0]), strict=True
            ):
                assert torch.equal(mine, theirs[self.rows, self.blocks])


def hold_parts(
    shape: tuple[int, int], cuts: list[tuple[slice, slice]], coded: bool, way: Way = CPU[-1]
) -> None:
    whole = Problem(torch.bfloat16, shapes=[shape], eight_bit=coded)
    parts = [Part(whole, *cut) for cut in cuts]
    for step in range(2):
        grads = whole.grads(step)
        cut = [part.cut(grads[0]) for part in parts]
        held = [*whole.all(), *grads, *cut]
        for part in parts:
            held += [part.param, part.first, part.second, *part.scales, part.step]
        with way.serving("fused_adamw"), reachable(way, held):
            _step(whole, grads, coded, step)
            for part, grad in zip(parts, cut, strict=True):
                part.move(grad, coded, step)
    for part in parts:
        part.hold(whole, coded)


def _step(whole: Problem, grads: list[Tensor], coded: bool, step: int) -> None:
    scales = {"exp_avg_scales": whole.first_scales, "exp_avg_sq_scales": whole.second_scales}
    fused_adamw(
        whole.params,
        grads,
        whole.first,
        whole.second,
        whole.steps,
        lr=1e-2,
        streams=[3],
        seed=5,
        rounding_step=step,
        **(scales if coded else {}),
    )


# Rows of 300 begin at any element of the whole; columns behind whole blocks, and anywhere.
SPLITS: dict[str, tuple[tuple[int, int], list[tuple[slice, slice]], bool]] = {
    "rows": ((7, 300), [(slice(0, 3), slice(0, 300)), (slice(3, 7), slice(0, 300))], True),
    "short rows": ((30, 20), [(slice(0, 13), slice(0, 20)), (slice(13, 30), slice(0, 20))], True),
    "columns": ((5, 600), [(slice(0, 5), slice(0, 512)), (slice(0, 5), slice(512, 600))], True),
    "both": ((5, 301), [(slice(2, 5), slice(97, 301)), (slice(1, 4), slice(0, 1))], False),
}


@pytest.mark.parametrize("way", [REFERENCE, *CPU, TRITON, HOSTRUN], ids=str)
@pytest.mark.parametrize("name", SPLITS)
def test_parts_have_the_bits_of_the_whole(
    way: Way, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way is REFERENCE:
        round_roots(monkeypatch)
    shape, cuts, coded = SPLITS[name]
    hold_parts(shape, cuts, coded, way)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_part_has_the_bits_of_the_whole(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 700))
    coded = data.draw(st.booleans())
    top = data.draw(st.integers(0, rows - 1))
    bottom = data.draw(st.integers(top + 1, rows))
    left = data.draw(st.integers(0, width - 1)) // (256 if coded else 1) * (256 if coded else 1)
    right = width if coded else data.draw(st.integers(left + 1, width))
    hold_parts((rows, width), [(slice(top, bottom), slice(left, right))], coded)


def test_a_part_beside_its_place_has_other_bits() -> None:
    """The check above sees a wrong place."""
    whole = Problem(torch.bfloat16, shapes=[(4, 300)])
    part = Part(whole, slice(1, 3), slice(0, 300))
    part.place = part.place[0] + 1, *part.place[1:]
    _step(whole, whole.grads(0), False, 0)
    part.move(part.cut(whole.grads(0)[0]), False, 0)
    with pytest.raises(AssertionError):
        part.hold(whole, False)


def test_sgd_takes_places_too() -> None:
    whole = torch.randn(6, 70).bfloat16()
    part, grad = whole[2:5, 10:50].clone(), torch.randn(6, 70).bfloat16()
    random = {"streams": [1], "seed": 2, "rounding_step": 3}
    fused_sgd([whole], [grad], lr=0.1, **random)
    fused_sgd([part], [grad[2:5, 10:50].clone()], lr=0.1, **random, places=[(2 * 70 + 10, 40, 70)])
    assert torch.equal(part, whole[2:5, 10:50])


def test_layouts_are_rounded_by_index() -> None:
    """Channels last lies in another order than its index says."""
    grad = torch.randn(4, 6, 5, 3).bfloat16()
    plain = torch.randn(4, 6, 5, 3).bfloat16()
    last = plain.clone().contiguous(memory_format=torch.channels_last)
    for param, given_grad in ((plain, grad), (last, grad.to(memory_format=torch.channels_last))):
        fused_sgd([param], [given_grad], lr=0.1, streams=[0], seed=1)
    assert torch.equal(plain, last)


# Adam's decay --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [REFERENCE, *CPU, TRITON, HOSTRUN], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_decay_in_the_gradient_is_adams(way: Way, maximize: bool) -> None:
    problem = Problem(torch.float32, shapes=[(7, 45)])
    wide = [p.double().requires_grad_() for p in problem.params]
    plain = [p.clone().requires_grad_() for p in problem.params]
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    theirs = [torch.optim.Adam(leaf, maximize=maximize, **options) for leaf in (wide, plain)]
    for step in range(2):
        grads = problem.grads(step)
        with way.serving("fused_adamw"), reachable(way, [*problem.all(), *grads]):
            fused_adamw(
                problem.params,
                grads,
                problem.first,
                problem.second,
                problem.steps,
                decoupled=False,
                maximize=maximize,
                **options,
            )
        for leaf, optimizer in zip((wide, plain), theirs, strict=True):
            leaf[0].grad = grads[0].to(leaf[0].dtype)
            optimizer.step()
    truth, torchs = wide[0].detach(), plain[0].detach()
    tolerance.check(problem.params[0], truth, torchs, truth.abs() + 1e-2)
