"""Fp8Weight: the storage of fp8_linear, float8_e4m3fn with float32 scales, and its quantisers.

e4m3fn (OCP 8-bit floating point, revision 1.0) has 3 bits of fraction, numbers up to 448, no
infinity and one NaN. Casts round to nearest even, and what lies past 448 becomes 448.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.base import Format, storage

SCALES = ("tensor", "row", "block")
ACTIVATIONS = ("none", "dynamic", "static")
BLOCK = 128  # rows and columns of W, and columns of x, that share a scale in blocks
PADDED = 16  # rows of codes are filled up to as many bytes, so that GPUs load wide words
LARGEST = 448.0
_CODES = torch.float8_e4m3fn


class Rows(NamedTuple):
    """Rounded rows: x is about ``scale * q``."""

    q: Tensor  # [.., K] float32, numbers of e4m3fn
    scale: Tensor  # [.., 1] or [.., ceil(K / 128)] float32; NaN for what holds NaN or inf

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * q [.., K] in float32 or float64."""
        q, scale = self.q.to(dtype), self.scale.to(dtype)
        if q.shape[-1] and scale.shape[-1] != 1:
            scale = scale.repeat_interleave(BLOCK, -1)[..., : q.shape[-1]]
        return q * scale if q.shape[-1] else q


def _scale_of(largest: Tensor) -> Tensor:
    return (largest / LARGEST).clamp(min=quantize.TINY)


def to_codes(x: Tensor) -> Tensor:
    """float32 as float8_e4m3fn: nearest, ties to even, saturating; NaN stays NaN."""
    return x.clamp(-LARGEST, LARGEST).to(_CODES)


def act_quant(x: Tensor, block: bool = False, x_scale: Tensor | None = None) -> Rows:
    """Round each row of ``x`` [.., K] to e4m3fn by its largest magnitude, which becomes 448.

    Args:
        x: floating.
        block: each 128 columns of a row have a scale; else the row has one.
        x_scale: float32 [1], the scale of all of x instead; what is past 448 of them becomes 448.
    """
    x = x.float()
    k = x.shape[-1]
    groups = -(-k // BLOCK) if block else 1
    length = BLOCK if block else max(k, 1)
    parts = F.pad(x, (0, groups * length - k)).unflatten(-1, (groups, length)) if groups else x
    largest = parts.abs().amax(-1) if groups else x
    finite = largest.isfinite()
    scale = _scale_of(largest) if x_scale is None else x_scale[0].expand(largest.shape)
    q = to_codes(parts * (1 / scale).unsqueeze(-1)).float() if groups else x
    if groups:
        q = torch.where(finite.unsqueeze(-1), q, 0).flatten(-2)[..., :k]
    return Rows(q, torch.where(finite, scale, torch.nan))


@storage
class Fp8Weight(Format):
    """A weight [N, K] as it is stored and saved: e4m3fn numbers times their scales."""

    values: Tensor  # [N, K rounded up to 16] float8_e4m3fn, 0 beyond K
    scale: Tensor  # float32: "tensor" [1, 1], "row" [N, 1], "block" [ceil(N/128), ceil(K/128)]
    x_scale: Tensor | None  # [1] float32, activations "static" only
    k: int
    scales: str  # tensor, row or block
    activations: str  # none, dynamic or static

    SCHEMA = "Tensor values, Tensor scale, Tensor? x_scale, int k, str scales, str activations"

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.values, self.scale, self.x_scale, self.k, self.scales, self.activations

    @classmethod
    def of(
        cls,
        _: int,
        values: Tensor,
        scale: Tensor,
        x_scale: Tensor | None,
        k: int,
        scales: str,
        activations: str,
    ) -> Fp8Weight:
        return cls(values, scale, x_scale, k, scales, activations)

    @classmethod
    def form(cls, scales: str = "row", activations: str = "dynamic") -> dict[str, Any]:
        """Keyword arguments of `from_dense`; a static scale of x is for the op alone."""
        if activations not in ("none", "dynamic"):
            raise ValueError(
                f"activations: expected 'none' or 'dynamic' for a layer in fp8; got {activations!r}"
            )
        check_form(scales, activations)
        return {"scales": scales, "activations": activations}

    @classmethod
    def rounded(cls, w: Tensor, scales: str = "row", **_: Any) -> Tensor:
        codes, scale = round_weight(w, scales)
        return cls(codes, scale, None, w.shape[1], scales, "none").to_dense()

    @classmethod
    def from_dense(
        cls, w: Tensor, scales: str = "row", activations: str = "dynamic", x_scale: Any = None
    ) -> Fp8Weight:
        """Round a matrix to float8_e4m3fn, the largest magnitude of what shares a scale to 448.

        Args:
            w: ``[N, K]``, any floating dtype.
            scales: what of W shares a scale: "tensor", all of it; "row", a row; "block", 128 rows
                by 128 columns (DeepSeek-V3, arXiv:2412.19437).
            activations: what the product does with x. "none": it stays in floating point.
                "dynamic": it becomes e4m3fn, each row with its own scale, or with "block" each 128
                columns of a row. "static": all of x by ``x_scale``, not with "block".
            x_scale: the scale of x for "static": the largest magnitude to represent, by 448.

        Raises:
            ValueError: w is no matrix, or holds NaN or inf; a form that is not there; an x_scale
                that is not finite and above 0.
            TypeError: w is no floating tensor.
        """
        quantize.check_weight(w)
        check_form(scales, activations)
        codes, scale = round_weight(w, scales)
        return cls._of_codes(codes, scale, scales, activations, x_scale)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        scales: str = "row",
        activations: str = "dynamic",
        x_scale: Any = None,
    ) -> Fp8Weight:
        """Store numbers that somebody else chose, as they are.

        Args:
            codes: ``[N, K]`` float8_e4m3fn.
            scale: float32 ``[N, 1]`` with scales "row", ``[1, 1]`` with "tensor",
                ``[ceil(N / 128), ceil(K / 128)]`` with "block".
            scales, activations, x_scale: as for `from_dense`.

        Raises:
            ValueError, TypeError: as `validate`.
        """
        check_form(scales, activations)
        for name, given in (("codes", codes), ("scale", scale)):
            checks.tensor(name, given)
        checks.dims("codes", codes, 2)
        checks.dtype("codes", codes, _CODES)
        made = cls._of_codes(codes, scale.detach().clone(), scales, activations, x_scale)
        made.validate()
        return made

    @classmethod
    def _of_codes(
        cls, codes: Tensor, scale: Tensor, scales: str, activations: str, x_scale: Any
    ) -> Fp8Weight:
        if (x_scale is not None) != (activations == "static"):
            raise ValueError(
                "x_scale: expected a scale with activations 'static', None with all others; got "
                f"{x_scale!r} with {activations!r}"
            )
        k = codes.shape[1]
        values = F.pad(codes.view(torch.uint8), (0, -k % PADDED)).view(_CODES)
        if x_scale is not None:
            x_scale = torch.as_tensor(x_scale, dtype=torch.float32, device=codes.device).detach()
            x_scale = x_scale.reshape(1).clone()
            _check_scale("x_scale", x_scale)
        return cls(values, scale, x_scale, k, scales, activations)

    @classmethod
    def empty(cls, n: int, k: int, scales: str = "row", activations: str = "dynamic") -> Fp8Weight:
        """The storage of a weight [N, K] on "meta", to be loaded."""
        width = -(-k // PADDED) * PADDED
        shape = scale_shape(n, k, scales)
        return cls(
            torch.empty((n, width), dtype=_CODES, device="meta"),
            torch.empty(shape, dtype=torch.float32, device="meta"),
            torch.empty(1, dtype=torch.float32, device="meta") if activations == "static" else None,
            k,
            scales,
            activations,
        )

    @property
    def rounds(self) -> bool:
        return self.activations != "none"

    def row_dims(self) -> dict[str, int]:
        return {"values": 0} if self.scales == "tensor" else {"values": 0, "scale": 0}

    @property
    def row_unit(self) -> int:
        return BLOCK if self.scales == "block" else 1

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that this weight stands for, float32 or float64 (rounds nothing)."""
        q = self.values.float()[:, : self.k].to(dtype)
        scale = self.scale.to(dtype)
        if self.scales == "block":
            scale = scale.repeat_interleave(BLOCK, 0)[: self.n]
            scale = scale.repeat_interleave(BLOCK, 1)[:, : self.k]
        return q * scale

    def check(self) -> None:
        check_form(self.scales, self.activations)
        values, scale, k = self.values, self.scale, self.k
        if k < 0:
            raise ValueError(f"k: expected at least 0; got {k}")
        checks.dims("values", values, 2)
        checks.dtype("values", values, _CODES)
        checks.shape("values", values, [values.shape[0], -(-k // PADDED) * PADDED])
        checks.dtype("scale", scale, torch.float32)
        checks.shape("scale", scale, scale_shape(values.shape[0], k, self.scales))
        checks.device("scale", scale, values)
        wanted = self.activations == "static"
        if (self.x_scale is not None) != wanted:
            raise ValueError(
                f"x_scale: expected {'a tensor' if wanted else 'None'} with activations "
                f"{self.activations!r}; got {'None' if self.x_scale is None else 'a tensor'}"
            )
        if self.x_scale is not None:
            checks.dtype("x_scale", self.x_scale, torch.float32)
            checks.shape("x_scale", self.x_scale, [1])
            checks.device("x_scale", self.x_scale, values)

    def validate(self) -> None:
        super().validate()
        codes = self.values.view(torch.uint8) & 127  # without the sign; 127 is NaN
        if bool((codes == 127).any()):
            raise ValueError("values: expected numbers; got NaN")
        if bool(codes[:, self.k :].any()):
            raise ValueError(f"values: expected zeros beyond column {self.k}")
        for name, scale in (("scale", self.scale), ("x_scale", self.x_scale)):
            if scale is not None:
                _check_scale(name, scale)


def _check_scale(name: str, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{name}: expected finite values above 0")


def scale_shape(n: int, k: int, scales: str) -> list[int]:
    """Shape of ``scale``."""
    if scales == "block":
        return [-(-n // BLOCK), -(-k // BLOCK)]
    return [n if scales == "row" else 1, 1]


def check_form(scales: str, activations: str) -> None:
    """Raise ValueError for a format that no kernel has."""
    if scales not in SCALES:
        raise ValueError(f"scales: expected one of {', '.join(SCALES)}; got {scales!r}")
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"activations: expected one of {', '.join(ACTIVATIONS)}; got {activations!r}"
        )
    if scales == "block" and activations == "static":
        raise ValueError(
            "activations: expected 'none' or 'dynamic' with scales 'block', which gives each 128 "
            "columns of a row of x a scale; got 'static'"
        )


def round_weight(w: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """(codes [N, K] float8_e4m3fn, scale) of a finite matrix; a scale of zeros alone is 1."""
    w = w.detach().float()
    n, k = w.shape
    if scales == "block":
        shape = scale_shape(n, k, scales)
        blocks = F.pad(w, (0, shape[1] * BLOCK - k, 0, shape[0] * BLOCK - n))
        blocks = blocks.view(shape[0], BLOCK, shape[1], BLOCK).abs()
        largest = blocks.amax((1, 3)) if n and k else w.new_zeros(shape)
    elif scales == "row":
        largest = w.abs().amax(1, keepdim=True) if k else w.new_zeros(n, 1)
    else:
        largest = w.abs().amax().view(1, 1) if n and k else w.new_zeros(1, 1)
    scale = torch.where(largest > 0, _scale_of(largest), 1)
    by = scale
    if scales == "block":
        by = scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return to_codes(w / by), scale
