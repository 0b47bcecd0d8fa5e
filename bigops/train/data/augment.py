"""Augment: Keras' ImageDataGenerator on whole batches, on the device that they are on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigops.train.data.keyed import uniform
from bigops.train.data.resample import FILL_MODES, affine

_EPSILON = 1e-6  # beside a standard deviation, as Keras has it
_PLACES = 1 << 17  # of a part of a batch on the CPU: few enough for the cache, enough to share
# Which of a sample's numbers serves what.
_DRAWS = (
    "rotation",
    "height",
    "height_sign",
    "width",
    "width_sign",
    "shear",
    "zoom_height",
    "zoom_width",
    "channel",
    "horizontal",
    "vertical",
    "brightness",
)

Shift = float | int | Sequence[float]


class Augment(nn.Module):
    """Random transforms of images in training, and what scales their values in any mode.

    ``augment(images, samples, epoch)``: images [batch, channels, height, width], uint8 or floating,
    with values of 0 to 255; samples int64 [batch], the numbers of the images in their data set. The
    result is of ``dtype`` (float64 of float64). In ``eval()`` only the values are scaled, and
    samples and epoch take no part.

    The order is Keras': rotation, shift, shear and zoom as one resampling about the middle;
    channel shift; horizontal flip; vertical flip; brightness; then ``preprocessing_function``,
    rescale, samplewise centre and deviation, featurewise ones. (ZCA whitening is left out.)
    Every random number is a function of (``seed``, epoch, sample), so that batches, workers, ranks
    and a resumed run do not change what becomes of an image.

    Args:
        rotation_range: degrees, up to which either way.
        width_shift_range, height_shift_range: a float: up to which share of the size either way,
            from 1 on pixels; an int n: whole pixels below n either way; a sequence: one of it,
            either way, as shares where all are below 1.
        brightness_range: two factors, between which one is drawn. Values are held to 0 to 255;
            those of an image that leaves that range are brought into it before, and back.
        shear_range: degrees, up to which either way.
        zoom_range: z for 1 - z to 1 + z, or two factors; height and width get their own.
        channel_shift_range: added to each channel, up to which either way, held to the image's
            smallest and largest value.
        fill_mode, cval: what stands outside of an image: see `resample`.
        horizontal_flip, vertical_flip: whether half of the images are flipped.
        rescale: factor of all values.
        preprocessing_function: of [batch, channels, height, width], gives as many; called
            for parts of a batch, so it has to treat images one by one.
        samplewise_center, samplewise_std_normalization: each image gets the mean 0 and the
            deviation 1; the second one implies the first.
        featurewise_center, featurewise_std_normalization: the same by the means and deviations of
            channels that `fit` finds.
        seed: of all random numbers.
        dtype: of the result.

    Unlike Keras, brightness does not round to whole numbers, and `fit` sees images rescaled and
    preprocessed, as the step that uses its figures does.

    Raises:
        ValueError: an argument out of range.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        *,
        featurewise_center: bool = False,
        samplewise_center: bool = False,
        featurewise_std_normalization: bool = False,
        samplewise_std_normalization: bool = False,
        rotation_range: float = 0,
        width_shift_range: Shift = 0.0,
        height_shift_range: Shift = 0.0,
        brightness_range: Sequence[float] | None = None,
        shear_range: float = 0.0,
        zoom_range: float | Sequence[float] = 0.0,
        channel_shift_range: float = 0.0,
        fill_mode: str = "nearest",
        cval: float = 0.0,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        rescale: float | None = None,
        preprocessing_function: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if fill_mode not in FILL_MODES:
            raise ValueError(
                f"fill_mode: expected one of {', '.join(FILL_MODES)}; got {fill_mode!r}"
            )
        for name, value in (
            ("rotation_range", rotation_range),
            ("shear_range", shear_range),
            ("channel_shift_range", channel_shift_range),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number from 0 on; got {value!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating one; got {dtype}")
        self.rotation_range, self.shear_range = rotation_range, shear_range
        self.width_shift_range = _shift("width_shift_range", width_shift_range)
        self.height_shift_range = _shift("height_shift_range", height_shift_range)
        self.brightness_range = None
        if brightness_range is not None:
            self.brightness_range = _two("brightness_range", brightness_range)
        if isinstance(zoom_range, int | float):
            zoom_range = (1 - zoom_range, 1 + zoom_range)
        self.zoom_range = _two("zoom_range", zoom_range)
        self.channel_shift_range = channel_shift_range
        self.fill_mode, self.cval = fill_mode, cval
        self.horizontal_flip, self.vertical_flip = horizontal_flip, vertical_flip
        self.rescale, self.preprocessing_function = rescale, preprocessing_function
        self.samplewise_center = samplewise_center or samplewise_std_normalization
        self.samplewise_std_normalization = samplewise_std_normalization
        self.featurewise_center = featurewise_center or featurewise_std_normalization
        self.featurewise_std_normalization = featurewise_std_normalization
        self.seed, self.dtype = seed, dtype
        self.register_buffer("mean", None, persistent=False)  # of channels, once `fit` was called
        self.register_buffer("std", None, persistent=False)

    def forward(self, images: Tensor, samples: Tensor | None = None, epoch: int = 0) -> Tensor:
        """
        Raises:
            ValueError: images of other dimensions, samples of another number.
            RuntimeError: featurewise figures are asked for, and `fit` was not called.
        """
        if images.dim() != 4:
            raise ValueError(
                f"images: expected [batch, channels, height, width]; got {list(images.shape)}"
            )
        if self.training and (samples is None or samples.shape != images.shape[:1]):
            got = None if samples is None else list(samples.shape)
            raise ValueError(f"samples: expected [{len(images)}] numbers of images; got {got}")
        places = max(1, images.shape[2] * images.shape[3])
        count = max(1, _PLACES // places) if images.device.type == "cpu" else max(1, len(images))
        if len(images) <= count:
            return self._forward(images, samples, epoch)
        numbers = [None] * len(images) if samples is None else samples.split(count)
        parts = zip(images.split(count), numbers, strict=False)
        return torch.cat([self._forward(part, own, epoch) for part, own in parts])

    def _forward(self, images: Tensor, samples: Tensor | None, epoch: int) -> Tensor:
        given, images = images.dtype, self._floating(images)
        if self.training and samples is not None:
            images = self._transformed(images, self.draws(samples.to(images.device), epoch))
        images = self._scaled(images)
        if self.featurewise_center:
            if self.mean is None or self.std is None:
                raise RuntimeError("fit: expected a call of it before featurewise figures are used")
            images = images - self.mean.to(images.dtype)
            if self.featurewise_std_normalization:
                images = images / (self.std.to(images.dtype) + _EPSILON)
        return images if given == torch.float64 else images.to(self.dtype)

    @torch.no_grad()
    def fit(self, images: Tensor | Iterable[Tensor]) -> None:
        """Find the means and deviations of channels.

        Args:
            images: [batch, channels, height, width], or batches of such, one after the other.

        Raises:
            ValueError: no pixels.
        """
        count, sums = 0, torch.zeros(2, 1, dtype=torch.float64, device="cpu")
        for batch in [images] if isinstance(images, Tensor) else images:
            values = self._scaled(self._floating(batch)).double()
            count += values.numel() // values.shape[1]
            both = torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
            sums = both + sums.to(both.device)
        if not count:
            raise ValueError("images: expected pixels; got none")
        mean, squares = sums / count
        self.mean = mean[:, None, None]
        self.std = (squares - mean.square()).clamp(min=0).sqrt()[:, None, None]

    def get_extra_state(self) -> dict[str, Tensor | None]:
        """The figures that `fit` found, whose shape nobody knows before."""
        return {"mean": self.mean, "std": self.std}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        """Take them over."""
        self.mean, self.std = state["mean"], state["std"]

    # --- random transforms -------------------------------------------------------------------

    def draws(self, samples: Tensor, epoch: int) -> dict[str, Tensor]:
        """What is drawn for images: float64 [batch] in [0, 1) each, by name."""
        columns = uniform(self.seed, epoch, samples, len(_DRAWS)).unbind(1)
        return dict(zip(_DRAWS, columns, strict=True))

    def matrices(self, draws: dict[str, Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Matrix [batch, 2, 2] and offset [batch, 2] that `resample.affine` takes, float64."""
        one = torch.ones_like(draws["rotation"])
        zero = one - 1
        angle = _either_way(draws["rotation"], math.radians(self.rotation_range))
        rotation = _matrix(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)
        down = _shifted(self.height_shift_range, draws["height"], draws["height_sign"], height)
        right = _shifted(self.width_shift_range, draws["width"], draws["width_sign"], width)
        shift = _matrix(one, zero, down, zero, one, right)
        slant = _either_way(draws["shear"], math.radians(self.shear_range))
        shear = _matrix(one, -slant.sin(), zero, zero, slant.cos(), zero)
        low, high = self.zoom_range
        tall, wide = (low + (high - low) * draws[f"zoom_{side}"] for side in ("height", "width"))
        zoom = _matrix(tall, zero, zero, zero, wide, zero)
        whole = rotation @ shift @ shear @ zoom
        middle = one.new_tensor([height / 2 - 0.5, width / 2 - 0.5])
        matrix = whole[:, :2, :2]
        return matrix, whole[:, :2, 2] + middle - matrix @ middle

    def _transformed(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        flips = (
            draws["vertical"] < 0.5 if self.vertical_flip else None,
            draws["horizontal"] < 0.5 if self.horizontal_flip else None,
        )
        if self._moves:  # flips, before which the channels are shifted, go along
            matrix, offset = self.matrices(draws, *images.shape[-2:])
            images = affine(images, matrix, offset, self.fill_mode, self.cval, flips)
        else:
            for dim, turned in zip((-2, -1), flips, strict=True):
                if turned is not None:
                    images = torch.where(_each(turned, images), images.flip(dim), images)
        if self.channel_shift_range:
            low, high = _extremes(images)
            shift = _either_way(draws["channel"], self.channel_shift_range)
            images = (images + _each(shift, images)).clamp(low, high)
        if self.brightness_range is not None:
            least, most = self.brightness_range
            factor = least + (most - least) * draws["brightness"]
            images = _brighter(images, _each(factor, images))
        return images

    @property
    def _moves(self) -> bool:
        shifts = (self.width_shift_range, self.height_shift_range)
        moved = any(isinstance(shift, tuple) or shift for shift in shifts)
        return bool(moved or self.rotation_range or self.shear_range or self.zoom_range != (1, 1))

    # --- values ------------------------------------------------------------------------------

    def _floating(self, images: Tensor) -> Tensor:
        """In the dtype of all that is reckoned: a smaller one is for the result."""
        return images if images.dtype == torch.float64 else images.float()

    def _scaled(self, images: Tensor) -> Tensor:
        if self.preprocessing_function is not None:
            shape = images.shape
            images = self.preprocessing_function(images)
            if images.shape != shape:
                raise ValueError(
                    f"preprocessing_function: expected the shape {list(shape)} back; got "
                    f"{list(images.shape)}"
                )
        if self.rescale is not None:
            images = images * self.rescale
        if self.samplewise_center:
            images = images - images.mean((1, 2, 3), keepdim=True)
        if self.samplewise_std_normalization:
            images = images / (images.std((1, 2, 3), correction=0, keepdim=True) + _EPSILON)
        return images


def _shift(name: str, value: Any) -> float | int | tuple[float, ...]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        values = () if isinstance(value, bool) else tuple(value)
        if not values:
            raise ValueError(f"{name}: expected a number or some of them; got {value!r}")
        return values
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a number from 0 on; got {value!r}")
    return value


def _two(name: str, value: Sequence[float]) -> tuple[float, float]:
    if len(value) != 2:
        raise ValueError(f"{name}: expected two numbers; got {value!r}")
    low, high = value
    return low, high


def _either_way(draw: Tensor, most: float) -> Tensor:
    return (2 * draw - 1) * most


def _shifted(
    option: float | int | tuple[float, ...], draw: Tensor, sign: Tensor, size: int
) -> Tensor:
    """Pixels of a shift."""
    if isinstance(option, float):
        return _either_way(draw, option * size if option < 1 else option)
    values = option if isinstance(option, tuple) else range(max(option, 1))
    scale = size if isinstance(option, tuple) and max(option) < 1 else 1
    table = torch.tensor(list(values), dtype=draw.dtype, device=draw.device) * scale
    return table[(draw * len(table)).long()] * torch.where(sign < 0.5, -1.0, 1.0)


def _matrix(*rows: Tensor) -> Tensor:
    """[batch, 3, 3] of its two upper rows."""
    zero = torch.zeros_like(rows[0])
    return torch.stack([*rows, zero, zero, zero + 1], -1).unflatten(-1, (3, 3))


def _each(of_image: Tensor, images: Tensor) -> Tensor:
    """A value of each image, to be used with its pixels."""
    value = of_image[:, None, None, None]
    return value if value.dtype == torch.bool else value.to(images.dtype)


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    low, high = images.flatten(1).aminmax(dim=1)
    return _each(low, images), _each(high, images)


def _brighter(images: Tensor, factor: Tensor) -> Tensor:
    low, high = _extremes(images)
    span = high - low
    brought = (low < 0) | (high > 255)
    within = (images - low) / torch.where(span > 0, span, 1) * 255
    new = (torch.where(brought, within, images) * factor).clamp(0, 255)
    return torch.where(brought, new / 255 * span + low, new)
