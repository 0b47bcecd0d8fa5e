"""Affine transforms of images in a batch, each by a matrix of its own, as scipy.ndimage has them.

What `scipy.ndimage.affine_transform` does at order=1: the value at an output place is that of the
input at ``matrix @ place + offset``, between the four pixels around. Outside of the pixels'
centres, 0 to size - 1:

- ``nearest``: the edge's pixel;
- ``reflect``: d c b a | a b c d | d c b a, mirrored about the edge of the edge's pixel;
- ``wrap``: a b c d | b c d | b c d: the period is size - 1, so the last pixel lies on the first
  (scipy's ``grid-wrap`` has the period size);
- ``constant``: ``cval`` wherever the place is outside, by however little. Nothing is mixed with it
  (``grid-constant`` does, as does `grid_sample` with zero padding).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FILL_MODES = ("nearest", "constant", "reflect", "wrap")


def affine(
    images: Tensor,
    matrix: Tensor,
    offset: Tensor,
    fill_mode: str = "nearest",
    cval: float = 0.0,
    flips: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Resample images between pixels.

    Args:
        images: [batch, channels, height, width], floating.
        matrix: float64 [batch, 2, 2]: of (row, column).
        offset: float64 [batch, 2].
        fill_mode: one of `FILL_MODES`.
        cval: value of places outside, for "constant".
        flips: bool [batch] each: whose result is turned upside down, and whose left to right.

    Returns:
        As ``images``. Where a place lies is reckoned in float64, so that float32 images are cut
        at the same places.

    Raises:
        ValueError: another fill_mode.
    """
    if fill_mode not in FILL_MODES:
        raise ValueError(f"fill_mode: expected one of {', '.join(FILL_MODES)}; got {fill_mode!r}")
    sizes = images.shape[-2:]
    places = [
        torch.arange(size, dtype=torch.float64, device=images.device).expand(len(images), size)
        for size in sizes
    ]
    for axis, turned in enumerate(flips):
        if turned is not None:
            places[axis] = torch.where(turned[:, None], places[axis].flip(1), places[axis])
    rows, columns = places[0][:, :, None], places[1][:, None]
    inside: Tensor | None = None
    grid = images.new_empty(len(images), *sizes, 2)
    for axis, size in enumerate(sizes):
        by_row, by_column = (matrix[:, axis, i, None, None] for i in (0, 1))
        # In scipy's order: at an edge the last bit decides.
        down, right = offset[:, axis, None, None] + by_row * rows, by_column * columns
        # grid_sample has -1 and 1 for the centres of the first and the last pixel, for "reflect"
        # for the outer edges of these; the last axis comes first.
        scale, start = 2 / max(size - 1, 1), -1.0
        if fill_mode == "reflect":
            scale, start = 2 / size, 1 / size - 1
        out = grid[..., 1 - axis]
        if fill_mode in ("wrap", "constant"):
            place = down + right
            if fill_mode == "wrap":
                torch.add(place.new_tensor(start), _wrapped(place, size - 1), alpha=scale, out=out)
                continue
            within = place.clamp(0, size - 1) == place
            inside = within if inside is None else inside.logical_and_(within)
        torch.add(down * scale + start, right * scale, out=out)
    mirrored = fill_mode == "reflect"
    padding = "reflection" if mirrored else "border"
    new = F.grid_sample(images, grid, padding_mode=padding, align_corners=not mirrored)
    return new if inside is None else torch.where(inside[:, None], new, cval)


def _wrapped(place: Tensor, period: int) -> Tensor:
    """A place on an axis as one from 0 to its period."""
    if period == 0:
        return torch.zeros_like(place)
    periods = place.div(period, rounding_mode="trunc")
    rest = place.sub(periods, alpha=period).add_(place < 0, alpha=period)
    return torch.where(place == period, place, rest)
