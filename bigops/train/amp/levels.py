"""The optimisation levels of apex.amp, and what a caller may say otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Level:
    """What a run of amp does; the fields are apex's properties."""

    cast_model_type: torch.dtype | None
    patched_type: torch.dtype | None  # what autocast computes in; None: no autocast
    keep_batchnorm_fp32: bool | None
    master_weights: bool | None
    loss_scale: float | str  # a number, or "dynamic"

    @property
    def scales(self) -> bool:
        """Whether a loss is scaled at all."""
        return self.loss_scale != 1.0

    @property
    def halves(self) -> bool:
        """Whether weights of the model are in 16 bits."""
        return self.cast_model_type not in (None, torch.float32)


LEVELS = {
    "O0": Level(torch.float32, None, None, False, 1.0),
    "O1": Level(None, torch.float16, None, None, "dynamic"),
    "O2": Level(torch.float16, None, True, True, "dynamic"),
    "O3": Level(torch.float16, None, False, False, 1.0),
    # of ROCm's apex
    "O4": Level(None, torch.bfloat16, None, None, 1.0),
    "O5": Level(torch.bfloat16, None, True, True, 1.0),
}
_CASTS = (torch.float32, torch.float16, torch.bfloat16)


def level(
    opt_level: str,
    *,
    cast_model_type: Any = None,
    patch_torch_functions: Any = None,
    keep_batchnorm_fp32: Any = None,
    master_weights: Any = None,
    loss_scale: Any = None,
) -> Level:
    """A level with the caller's changes; None leaves what the level says.

    Raises:
        RuntimeError: an unknown level, or a change that it forbids (apex's class of error).
        ValueError: a value out of range.
    """
    if opt_level not in LEVELS:
        raise RuntimeError(
            f"opt_level: expected one of {', '.join(LEVELS)} (the letter O); got {opt_level!r}"
        )
    base = LEVELS[opt_level]
    patches = base.patched_type is not None
    asked = patch_torch_functions is not None
    if asked and _flag("patch_torch_functions", patch_torch_functions) and not patches:
        raise RuntimeError(
            f"patch_torch_functions: expected True for O1 alone; got it with {opt_level}"
        )
    changes: dict[str, Any] = {}
    if keep_batchnorm_fp32 is not None:
        changes["keep_batchnorm_fp32"] = _flag("keep_batchnorm_fp32", keep_batchnorm_fp32)
    if master_weights is not None:
        changes["master_weights"] = _flag("master_weights", master_weights)
    if cast_model_type is not None and cast_model_type is not False:
        if cast_model_type not in _CASTS:
            names = ", ".join(map(str, _CASTS))
            raise ValueError(f"cast_model_type: expected one of {names}; got {cast_model_type!r}")
        changes["cast_model_type"] = cast_model_type
    if patches and changes:
        raise RuntimeError(
            f"{next(iter(changes))}: expected None with {opt_level}, whose weights stay float32 "
            "and whose batch norms autocast runs; O2 and O3 cast the model"
        )
    if loss_scale is not None:
        changes["loss_scale"] = _scale(loss_scale)
    return replace(base, **changes)


def _flag(name: str, value: Any) -> bool:
    named = {"True": True, "False": False}
    value = named.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True, False or a string of them; got {value!r}")
    return value


def _scale(value: Any) -> float | str:
    if value == "dynamic":
        return "dynamic"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"loss_scale: expected 'dynamic' or a number above 0; got {value!r}")
    return number
