"""Augment: scipy's resampling, Keras' arguments and order, numbers that are a sample's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigops.train.data import Augment
from bigops.train.data.keyed import _GAMMA, _mixed, keys, uniform
from bigops.train.data.resample import FILL_MODES, affine

ndimage = pytest.importorskip("scipy.ndimage")
BAR = 1e-5  # of values up to 1


def by_scipy(images: Tensor, matrix: Tensor, offset: Tensor, mode: str, cval: float) -> Tensor:
    """Each channel of each image by itself, in float64."""
    planes = [
        [
            ndimage.affine_transform(plane, m, o, order=1, mode=mode, cval=cval)
            for plane in image.double().numpy()
        ]
        for image, m, o in zip(images, matrix.numpy(), offset.numpy(), strict=True)
    ]
    return torch.from_numpy(np.array(planes))


def random_case(seed: int, size: tuple[int, int], spread: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kind = {"dtype": torch.float64, "generator": generator}
    images = torch.rand(4, 2, *size, **kind)
    matrix = torch.eye(2, dtype=torch.float64) + spread * torch.randn(4, 2, 2, **kind)
    offset = spread * max(size) * torch.randn(4, 2, **kind)
    # whole pixels, and right angles, whose places lie on the edges themselves
    matrix[2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    offset[2:] = offset[2:].round()
    matrix[3] = torch.eye(2)
    return images, matrix, offset


@pytest.mark.parametrize("mode", FILL_MODES)
@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([0.1, 1.0, 5.0]),
)
def test_resampling_is_scipys(mode: str, seed: int, size: tuple[int, int], spread: float) -> None:
    images, matrix, offset = random_case(seed, size, spread)
    expected = by_scipy(images, matrix, offset, mode, -0.7)
    error = (affine(images, matrix, offset, mode, -0.7) - expected).abs().max()
    assert error < BAR
    single = affine(images.float(), matrix, offset, mode, -0.7)
    assert (single - expected).abs().max() < BAR


def test_other_meanings_of_the_words_are_seen() -> None:
    """scipy's grid-wrap, grid-constant and mirror."""
    images, matrix, offset = random_case(0, (7, 8), 0.3)
    for mode, other in (
        ("wrap", "grid-wrap"),
        ("constant", "grid-constant"),
        ("reflect", "mirror"),
    ):
        ours = affine(images, matrix, offset, mode, 0.0)
        assert (ours - by_scipy(images, matrix, offset, other, 0.0)).abs().max() > 0.01
    with pytest.raises(ValueError, match="fill_mode: expected one of nearest, .*; got 'mirror'"):
        affine(images, matrix, offset, "mirror")


# --- Keras' arguments and order -------------------------------------------------------------


def keras(image: np.ndarray, u: dict[str, float], o: dict[str, Any]) -> np.ndarray:
    """One image [channels, height, width], as the documentation of ImageDataGenerator has it."""
    _, height, width = image.shape

    def shift(name: str, size: int) -> float:
        option, draw = o.get(f"{name}_shift_range", 0.0), u[name]
        if isinstance(option, float):
            pixels = (2 * draw - 1) * option
            return pixels * size if option < 1 else pixels
        values = list(range(option)) if isinstance(option, int) else list(option)
        pixels = values[int(draw * len(values))] * (-1 if u[f"{name}_sign"] < 0.5 else 1)
        return pixels * size if not isinstance(option, int) and max(option) < 1 else pixels

    angle = math.radians((2 * u["rotation"] - 1) * o.get("rotation_range", 0))
    slant = math.radians((2 * u["shear"] - 1) * o.get("shear_range", 0))
    zoom = o.get("zoom_range", 0.0)
    low, high = zoom if isinstance(zoom, tuple) else (1 - zoom, 1 + zoom)
    tall, wide = (low + (high - low) * u[f"zoom_{side}"] for side in ("height", "width"))
    turn = [
        [math.cos(angle), -math.sin(angle), 0],
        [math.sin(angle), math.cos(angle), 0],
        [0, 0, 1],
    ]
    move = [[1, 0, shift("height", height)], [0, 1, shift("width", width)], [0, 0, 1]]
    lean = [[1, -math.sin(slant), 0], [0, math.cos(slant), 0], [0, 0, 1]]
    scale = [[tall, 0, 0], [0, wide, 0], [0, 0, 1]]
    to = np.array([[1, 0, height / 2 - 0.5], [0, 1, width / 2 - 0.5], [0, 0, 1]])
    whole = to @ np.array(turn) @ move @ lean @ scale @ np.linalg.inv(to)
    where = {"order": 1, "mode": o.get("fill_mode", "nearest"), "cval": o.get("cval", 0.0)}
    new = np.stack(
        [ndimage.affine_transform(plane, whole[:2, :2], whole[:2, 2], **where) for plane in image]
    )
    if "channel_shift_range" in o:
        by = (2 * u["channel"] - 1) * o["channel_shift_range"]
        new = np.clip(new + by, new.min(), new.max())
    if o.get("horizontal_flip") and u["horizontal"] < 0.5:
        new = new[:, :, ::-1]
    if o.get("vertical_flip") and u["vertical"] < 0.5:
        new = new[:, ::-1]
    if "brightness_range" in o:
        low, high = o["brightness_range"]
        least, most = new.min(), new.max()
        outside = least < 0 or most > 255
        value = (new - least) / (most - least) * 255 if outside else new
        value = np.clip(value * (low + (high - low) * u["brightness"]), 0, 255)
        new = value / 255 * (most - least) + least if outside else value
    if "preprocessing_function" in o:
        new = o["preprocessing_function"](new)
    new = new * o.get("rescale", 1.0)
    if o.get("samplewise_center"):
        new = new - new.mean()
    if o.get("samplewise_std_normalization"):
        new = new / (new.std() + 1e-6)
    return new


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a turn": {"rotation_range": 40},
    "shares": {"width_shift_range": 0.3, "height_shift_range": 0.1, "fill_mode": "wrap"},
    "pixels": {"width_shift_range": 3.5, "height_shift_range": 3, "fill_mode": "reflect"},
    "lists": {"width_shift_range": (0.1, 0.4), "height_shift_range": (-1, 2, 3)},
    "shear": {"shear_range": 30.0, "fill_mode": "constant", "cval": 7.0},
    "zoom": {"zoom_range": 0.4},
    "two zooms": {"zoom_range": (0.5, 0.8), "horizontal_flip": True, "vertical_flip": True},
    "channels": {"channel_shift_range": 60.0, "rotation_range": 10},
    "light": {"brightness_range": (0.3, 2.5)},
    "light outside": {
        "brightness_range": (0.3, 2.5),
        "channel_shift_range": 40.0,
        "cval": -90.0,
        "fill_mode": "constant",
        "width_shift_range": 0.4,
    },
    "values": {
        "rescale": 1 / 255,
        "samplewise_center": True,
        "samplewise_std_normalization": True,
        "preprocessing_function": lambda x: x * 2 + 1,
    },
    "all": {
        "rotation_range": 20,
        "width_shift_range": 0.1,
        "height_shift_range": 2,
        "shear_range": 5.0,
        "zoom_range": 0.2,
        "channel_shift_range": 20.0,
        "horizontal_flip": True,
        "vertical_flip": True,
        "brightness_range": (0.5, 1.5),
        "fill_mode": "reflect",
        "rescale": 1 / 255,
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_arguments_mean_what_keras_means(case: str) -> None:
    options = OPTIONS[case]
    images = torch.rand(24, 3, 9, 12, dtype=torch.float64) * 255
    samples = torch.arange(100, 124)
    augment = Augment(seed=5, **options)
    out = augment(images, samples, epoch=2)
    draws = augment.draws(samples, 2)
    for i, image in enumerate(images):
        expected = keras(image.numpy(), {name: float(u[i]) for name, u in draws.items()}, options)
        assert (out[i] - torch.from_numpy(expected.copy())).abs().max() < BAR * 255, i


# --- random numbers -------------------------------------------------------------------------


def test_the_generator_is_splitmix64() -> None:
    """Against the figures of the reference in C for the seed 1234567."""
    state = torch.tensor(1234567) + torch.arange(1, 4) * _GAMMA
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [number % 2**64 for number in _mixed(state).tolist()] == known


def test_numbers_are_a_samples_own_and_uniform() -> None:
    samples = torch.arange(4000)
    numbers = uniform(3, 1, samples, 5)
    assert torch.equal(uniform(3, 1, samples[70:71], 5)[0], numbers[70])
    assert torch.equal(uniform(3, 1, samples.flip(0), 3).flip(0), numbers[:, :3])
    assert not (uniform(3, 2, samples, 5) == numbers).any()
    assert not (uniform(4, 1, samples, 5) == numbers).any()
    assert keys(-1, 2**40, samples).unique().numel() == 4000
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 50, 0, 1)
    assert ((counts - 400).square() / 400).sum() < 95  # chi square of 49 degrees: 1 in 10,000
    seen = torch.corrcoef(torch.cat([numbers, uniform(3, 2, samples, 5), samples[:, None]], 1).T)
    assert (seen - torch.eye(11)).abs().max() < 5 / math.sqrt(4000)


def test_an_image_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    augment = Augment(**OPTIONS["all"], seed=9)
    images, samples = torch.randint(0, 256, (12, 3, 8, 8)).byte(), torch.arange(50, 62)
    whole = augment(images, samples, 4)
    assert whole.dtype == torch.float32
    order = torch.randperm(12)
    parts = [augment(images[i : i + 1], samples[i : i + 1], 4) for i in order]
    assert (torch.cat(parts) - whole[order]).abs().max() < 1e-6
    assert (augment(images, samples, 5) - whole).flatten(1).abs().max(1).values.min() > 0.01
    monkeypatch.setattr("bigops.train.data.augment._PLACES", 3 * 64)
    state = torch.get_rng_state()
    assert (augment(images, samples, 4) - whole).abs().max() < 1e-6
    augment.eval()(images)
    small = Augment(**OPTIONS["all"], seed=9, dtype=torch.bfloat16)
    assert torch.equal(small(images, samples, 4), whole.bfloat16())
    assert torch.equal(torch.get_rng_state(), state)


# --- values ---------------------------------------------------------------------------------


def test_featurewise_figures_are_those_of_the_data() -> None:
    data = torch.rand(40, 3, 5, 4) * torch.tensor([1.0, 50.0, 200.0])[:, None, None]
    augment = Augment(featurewise_std_normalization=True, rescale=1 / 255, rotation_range=90)
    with pytest.raises(RuntimeError, match="fit: expected a call"):
        augment.eval()(data)
    augment.fit(data.split(7))
    scaled = augment.eval()(data)
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-4
    assert (scaled.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
    again = Augment(featurewise_std_normalization=True, rescale=1 / 255)
    again.load_state_dict(augment.state_dict())
    assert torch.equal(again.eval()(data), scaled)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "fill": ({"fill_mode": "zeros"}, "fill_mode: expected one of nearest, .*; got 'zeros'"),
    "turn": ({"rotation_range": -1}, "rotation_range: expected a number from 0 on; got -1"),
    "shift": ({"width_shift_range": -0.1}, "width_shift_range: expected .*; got -0.1"),
    "no shift": ({"height_shift_range": []}, r"height_shift_range: expected .*; got \[\]"),
    "light": ({"brightness_range": [1]}, "brightness_range: expected two numbers"),
    "zoom": ({"zoom_range": (1, 2, 3)}, "zoom_range: expected two numbers"),
    "dtype": ({"dtype": torch.uint8}, "dtype: expected a floating one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Augment(**options)


def test_bad_calls() -> None:
    augment = Augment(preprocessing_function=lambda x: x[..., :2])
    with pytest.raises(ValueError, match=r"images: expected \[batch, .*; got \[3, 4, 4\]"):
        augment(torch.zeros(3, 4, 4))
    for samples in (None, torch.arange(3)):
        with pytest.raises(ValueError, match=r"samples: expected \[2\] numbers of images"):
            augment(torch.zeros(2, 3, 4, 4), samples)
    with pytest.raises(ValueError, match=r"preprocessing_function: expected the shape \[2, 3"):
        augment(torch.zeros(2, 3, 4, 4), torch.arange(2))
    with pytest.raises(ValueError, match="images: expected pixels; got none"):
        augment.fit([])
