"""QuantizedWeight: the storage of quantized_linear, which its kernels read as it lies.

Tiles of 16 rows; in a tile, lines of 64 bytes along K; in a line, 4 bytes for each of the rows:
4 columns in int8 or 8 in int4. One line is one operand of an AVX-512 product (vpdpbusd), so nothing
is repacked at run time. In int4 a nibble holds q + 8, and the nibbles of a row's 4 bytes, lowest
first, are columns 0 2 4 6 1 3 5 7 (see csrc/cpu/simd/quantized_linear.h for the reason).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.base import Format, storage

TILE = 16  # weight rows
GROUPS = (0, 32, 64, 128)  # columns that share a scale; 0: all of them
ACTIVATIONS = ("none", "dynamic", "symmetric", "static")
# Columns in the low and the high nibbles of the 4 bytes of a row.
_LOW, _HIGH = [0, 4, 1, 5], [2, 6, 3, 7]
_FROM_NIBBLES = [(_LOW + _HIGH).index(column) for column in range(8)]


def columns_of(bits: int) -> int:
    """Columns in a line."""
    return 4 if bits == 8 else 8


def sizes(n: int, k: int, bits: int, group: int) -> tuple[list[int], list[int]]:
    """Shapes of ``values`` and of ``scale`` (and ``zero_point``)."""
    tiles, lines = -(-n // TILE), -(-k // columns_of(bits))
    groups = 1 if group == 0 else -(-k // group)
    return [tiles, lines, TILE, 4], [groups, tiles * TILE]


def pack(q: Tensor, bits: int) -> Tensor:
    """Whole numbers [N, K] as tiles: int8, or uint8 with two 4-bit numbers each."""
    n, k = q.shape
    shape, _ = sizes(n, k, bits, 0)
    columns = columns_of(bits)
    padded = torch.nn.functional.pad(q, (0, shape[1] * columns - k, 0, shape[0] * TILE - n))
    tiles = padded.view(shape[0], TILE, shape[1], columns).transpose(1, 2)
    if bits == 8:
        return tiles.to(torch.int8).contiguous()
    nibbles = (tiles + 8).to(torch.uint8)
    return (nibbles[..., _LOW] | nibbles[..., _HIGH] << 4).contiguous()


def unpack(values: Tensor, n: int, k: int, bits: int) -> Tensor:
    """The numbers q [N, K] in float32; the inverse of `pack`."""
    if bits == 8:
        q = values.float()
    else:
        nibbles = torch.cat([values & 15, values >> 4], -1)[..., _FROM_NIBBLES]
        q = nibbles.float() - 8
    tiles, lines, _, columns = q.shape
    return q.transpose(1, 2).reshape(tiles * TILE, lines * columns)[:n, :k]


def lanes(t: Tensor) -> Tensor:
    """[N, groups] as the kernels read it: [groups, N rounded up to whole tiles], 0 beyond N."""
    n = t.shape[0]
    return torch.nn.functional.pad(t.t(), (0, -n % TILE)).contiguous()


@storage
class QuantizedWeight(Format):
    """A weight [N, K] in int8 or int4: ``scale * (q - zero_point)``, groups along K."""

    values: Tensor  # q in tiles: int8 [ceil(N/16), ceil(K/4), 16, 4], uint8 [.., ceil(K/8), ..]
    scale: Tensor  # [groups, N16] float32, N16 = N rounded up to 16
    zero_point: Tensor | None  # [groups, N16] int8
    row_sum: Tensor | None  # [N16] int32 sums of q; in 4 bits float32 sums of the matrix
    x_qparams: Tensor | None  # [2] float32: scale and zero point of x, activations "static" only
    n: int
    k: int
    bits: int  # 8 or 4
    group: int  # 32, 64 or 128 columns; 0: one group
    activations: str  # none, dynamic, symmetric or static

    # ``pad``, the rows that fill up the last tile, stands for N, so that whole tiles are a weight
    # by themselves: DTensor splits a weight without knowing the op's numbers.
    SCHEMA = (
        "Tensor values, Tensor scale, Tensor? zero_point, Tensor? row_sum, Tensor? x_qparams, "
        "int pad, int k, int bits, int group, str activations"
    )

    @property
    def pad(self) -> int:
        """Rows that fill up the last tile."""
        return -self.n % TILE

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (
            self.values,
            self.scale,
            self.zero_point,
            self.row_sum,
            self.x_qparams,
            -self.n % TILE,
            self.k,
            self.bits,
            self.group,
            self.activations,
        )

    @classmethod
    def of(
        cls,
        _: int,
        values: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        row_sum: Tensor | None,
        x_qparams: Tensor | None,
        pad: int,
        k: int,
        bits: int,
        group: int,
        activations: str,
    ) -> QuantizedWeight:
        checks.dims("values", values, 4)
        n = values.shape[0] * TILE - pad
        if not (0 <= pad < TILE and n >= 0):
            raise ValueError(
                f"pad: expected the rows that fill up the last tile of {TILE}; got {pad}"
            )
        return cls(values, scale, zero_point, row_sum, x_qparams, n, k, bits, group, activations)

    @property
    def rounds(self) -> bool:
        return self.activations != "none"

    @property
    def takes_rows(self) -> bool:
        return self.activations in ("dynamic", "symmetric")

    def row_dims(self) -> dict[str, int]:
        return {"values": 0, "scale": 1, "zero_point": 1, "row_sum": 0}

    @property
    def row_unit(self) -> int:
        return TILE

    @classmethod
    def form(
        cls,
        bits: int = 8,
        group: int | None = None,
        symmetric: bool = True,
        activations: str | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of `from_dense`; activations None: "dynamic" for int8 rows."""
        if activations is None:
            activations = "dynamic" if bits == 8 and group is None else "none"
        check_form(bits, group or 0, activations)
        return {"bits": bits, "group": group, "symmetric": symmetric, "activations": activations}

    @classmethod
    def rounded(
        cls, w: Tensor, bits: int = 8, group: int | None = None, symmetric: bool = True, **_: Any
    ) -> Tensor:
        columns = group or 0
        return quantize.round_weight(w, bits, columns, symmetric).dense(columns)

    @classmethod
    def from_dense(
        cls,
        w: Tensor,
        bits: int = 8,
        group: int | None = None,
        symmetric: bool = True,
        activations: str | None = None,
        x_qparams: Any = None,
    ) -> QuantizedWeight:
        """Round a matrix to int8 or int4.

        Args:
            w: ``[N, K]``, any floating dtype.
            bits: 8 or 4.
            group: columns that share a scale: 32, 64 or 128, or None for one scale per row. None
                with an int8 weight and quantised activations.
            symmetric: no zero points; else each group has one, and its range takes all codes.
            activations: what the product does with x. "none": it stays in floating point.
                "dynamic": each row becomes u8 with its own scale and zero point; "symmetric": with
                its own scale only; "static": with the scale and zero point of ``x_qparams``. None:
                "dynamic" for int8 with one scale per row, else "none".
            x_qparams: scale and zero point of x for "static" (`static_qparams` of a range).

        Raises:
            ValueError: w is no matrix, or holds NaN or inf; a form that is not there.
            TypeError: w is no floating tensor.
        """
        quantize.check_weight(w)
        columns, form = group or 0, cls.form(bits, group, symmetric, activations)
        activations = form["activations"]
        rounded = quantize.round_weight(w.detach(), bits, columns, symmetric)
        return cls._of_rounded(rounded, bits, columns, activations, x_qparams)

    @classmethod
    def from_codes(
        cls,
        q: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        *,
        bits: int = 8,
        group: int | None = None,
        activations: str = "none",
        x_qparams: Any = None,
    ) -> QuantizedWeight:
        """Store numbers that somebody else chose, as they are: ``scale * (q - zero_point)``.

        Args:
            q: whole numbers ``[N, K]`` of any dtype: -128..127 with 8 bits, -8..7 with 4.
            scale: float32 ``[N, groups]``, finite and above 0; one group with ``group`` None.
            zero_point: whole numbers ``[N, groups]`` in the range of q, or None.
            bits, group, activations, x_qparams: as for `from_dense`.

        Raises:
            ValueError: numbers that the format does not hold, or shapes that do not fit.
            TypeError: a scale of another dtype, or no tensors.
        """
        columns = 0 if group is None else group
        check_form(bits, columns, activations)
        for name, given in (("q", q), ("scale", scale)):
            checks.tensor(name, given)
        checks.tensors(zero_point=zero_point)
        checks.dims("q", q, 2)
        checks.dtype("scale", scale, torch.float32)
        n, k = q.shape
        shape = [n, 1 if columns == 0 else -(-k // columns)]
        checks.shape("scale", scale, shape)
        low, high = (-128, 127) if bits == 8 else (-8, 7)
        for name, t in (("q", q), ("zero_point", zero_point)):
            if t is not None:
                check_range(name, t, low, high)
                if bool((t != t.round()).any() if t.is_floating_point() else False):
                    raise ValueError(f"{name}: expected whole numbers; got others")
        zero = None
        if zero_point is not None:
            checks.shape("zero_point", zero_point, shape)
            zero = zero_point.float()
        rounded = quantize.Rounded(q.float(), scale.detach(), zero)
        made = cls._of_rounded(rounded, bits, columns, activations, x_qparams)
        made.validate()
        return made

    @classmethod
    def _of_rounded(
        cls, rounded: quantize.Rounded, bits: int, group: int, activations: str, x_qparams: Any
    ) -> QuantizedWeight:
        if (x_qparams is not None) != (activations == "static"):
            raise ValueError(
                "x_qparams: expected a scale and a zero point with activations 'static', None with "
                f"all others; got {x_qparams!r} with {activations!r}"
            )
        n, k = rounded.q.shape
        zero = None if rounded.zero_point is None else lanes(rounded.zero_point).to(torch.int8)
        sums = None
        if activations != "none":
            sums = lanes(row_sums(rounded, bits, group).unsqueeze(1))[0]
        if x_qparams is not None:
            x_qparams = torch.as_tensor(x_qparams, dtype=torch.float32, device=rounded.q.device)
            x_qparams = x_qparams.detach().clone()
            quantize.check_qparams("x_qparams", x_qparams)
        return cls(
            pack(rounded.q, bits),
            lanes(rounded.scale),
            zero,
            sums,
            x_qparams,
            n,
            k,
            bits,
            group,
            activations,
        )

    @classmethod
    def empty(
        cls,
        n: int,
        k: int,
        bits: int = 8,
        group: int | None = None,
        symmetric: bool = True,
        activations: str = "dynamic",
    ) -> QuantizedWeight:
        """The storage of a weight [N, K] on "meta", to be loaded."""
        columns = group or 0
        values, scale = sizes(n, k, bits, columns)

        def tensor(shape: list[int], dtype: torch.dtype, there: bool = True) -> Any:
            return torch.empty(shape, dtype=dtype, device="meta") if there else None

        return cls(
            tensor(values, torch.int8 if bits == 8 else torch.uint8),
            tensor(scale, torch.float32),
            tensor(scale, torch.int8, not symmetric),
            tensor(scale[1:], torch.int32 if bits == 8 else torch.float32, activations != "none"),
            tensor([2], torch.float32, activations == "static"),
            n,
            k,
            bits,
            columns,
            activations,
        )

    def codes(self) -> quantize.Rounded:
        """The numbers by row: q [N, K], scale and zero point [N, groups]."""
        zero = self.zero_point
        return quantize.Rounded(
            unpack(self.values, self.n, self.k, self.bits),
            self.scale.t()[: self.n],
            None if zero is None else zero.t()[: self.n].float(),
        )

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that this weight stands for; float64 rounds nothing."""
        q, scale, zero = self.codes()
        if dtype == torch.float64:
            q, scale = q.double(), scale.double()
        return quantize.Rounded(q, scale, zero).dense(self.group).to(dtype)

    def check(self) -> None:
        n, k, bits, group, activations = self.n, self.k, self.bits, self.group, self.activations
        check_form(bits, group, activations)
        if n < 0 or k < 0:
            raise ValueError(f"n, k: expected at least 0; got {n}, {k}")
        values_shape, scale_shape = sizes(n, k, bits, group)
        sums = torch.int32 if bits == 8 else torch.float32
        has_zero, has_sums, static = (
            self.zero_point is not None,
            activations != "none",
            activations == "static",
        )
        for name, dtype, shape, wanted in (
            ("values", torch.int8 if bits == 8 else torch.uint8, values_shape, True),
            ("scale", torch.float32, scale_shape, True),
            ("zero_point", torch.int8, scale_shape, has_zero),
            ("row_sum", sums, scale_shape[1:], has_sums),
            ("x_qparams", torch.float32, [2], static),
        ):
            t = getattr(self, name)
            if (t is not None) != wanted:
                raise ValueError(
                    f"{name}: expected {'a tensor' if wanted else 'None'} with activations "
                    f"{activations!r}; got {'None' if t is None else 'a tensor'}"
                )
            if t is not None:
                checks.dtype(name, t, dtype)
                checks.shape(name, t, shape)
                checks.device(name, t, self.values)

    def validate(self) -> None:
        super().validate()
        scale = self.scale[:, : self.n]
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError("scale: expected finite values above 0")
        if self.bits == 4 and self.zero_point is not None:
            check_range("zero_point", self.zero_point, -8, 7)
        if bool(self._beyond().any()):
            raise ValueError(f"values: expected zeros beyond column {self.k}")
        if self.row_sum is not None and not self._has_sums(self.row_sum):
            raise ValueError("row_sum: expected the sums of the weight's rows; got others")
        if self.x_qparams is not None:
            quantize.check_qparams("x_qparams", self.x_qparams)

    def _beyond(self) -> Tensor:
        """The numbers that fill up the last line of each row."""
        last, rest = self.values[:, -1:], self.k % columns_of(self.bits)
        if self.bits == 4:
            last = torch.cat([last & 15, last >> 4], -1)[..., _FROM_NIBBLES] ^ 8
        return last[..., rest:] if rest else last[..., :0]

    def _has_sums(self, sums: Tensor) -> bool:
        """Whether these are the sums of the rows; taken of the packed numbers, some at a time."""
        # [tiles, groups, rows]; filled in place: results that are kept split the allocator's room.
        tiles, lines = self.values.shape[:2]
        per = self.group // columns_of(self.bits) if self.group else max(lines, 1)
        q = self.values.new_zeros((tiles, -(-lines // per), TILE), dtype=torch.int32)
        step = max(1, 2**17 // max(lines * TILE * 4, 1))  # about 128 KB
        for first in range(0, tiles if lines else 0, step):
            part = self.values[first : first + step]
            if self.bits == 8:
                q[first : first + step, 0] = part.sum((1, 3), dtype=torch.int32)
                continue
            line = (part & 15).sum(-1, dtype=torch.int32) + (part >> 4).sum(-1, dtype=torch.int32)
            line -= 8 * columns_of(4)  # nibbles hold q + 8
            filled = torch.nn.functional.pad(line, (0, 0, 0, -lines % per))
            q[first : first + step] = filled.unflatten(1, (-1, per)).sum(2)
        whole = q.transpose(0, 1).flatten(1)  # [groups, rows]
        if self.bits == 8:
            return torch.equal(whole.sum(0, dtype=torch.int32)[: self.n], sums[: self.n])
        scale = self.scale.double()
        start = torch.arange(scale.shape[0], device=q.device).unsqueeze(1) * self.group
        columns = (self.k - start).clamp(max=self.group or self.k)
        exact = whole.double() if lines else scale * 0
        if self.zero_point is not None:
            exact = exact - self.zero_point.double() * columns
        want, most = (exact * scale).sum(0), (scale * columns * 15).sum(0)  # |q - zero point| <= 15
        # Only the rounding to float32 may differ, and the order in which float64 was summed.
        off = (sums.double() - want).abs()[: self.n]
        room = want.abs() * 2**-24 + most * (self.k * 2.0**-52) + 2.0**-149
        return bool((off <= room[: self.n]).all())


def check_range(name: str, t: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless low <= t <= high."""
    if bool(((t < low) | (t > high)).any()):
        raise ValueError(f"{name}: expected values in {low}..{high}")


def check_form(bits: int, group: int, activations: str) -> None:
    """Raise ValueError for a format that no kernel has."""
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 8 or 4; got {bits!r}")
    if group not in GROUPS:
        raise ValueError(f"group: expected None, 32, 64 or 128; got {group!r}")
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"activations: expected one of {', '.join(ACTIVATIONS)}; got {activations!r}"
        )
    if bits == 8 and group and activations != "none":
        raise ValueError(
            "group: expected None with an int8 weight and quantised activations (its sums run over "
            f"all of K in int32); got {group}"
        )


def row_sums(rounded: quantize.Rounded, bits: int, group: int) -> Tensor:
    """[N] sums over K: of q in int32, or in 4 bits of the dequantised rows in float32.

    What a zero point of x adds to a product is that zero point times these.
    """
    if bits == 8:
        return rounded.q.sum(1, dtype=torch.float64).to(torch.int32)
    q, scale, zero = rounded
    return quantize.Rounded(q.double(), scale.double(), zero).dense(group).sum(1).float()
