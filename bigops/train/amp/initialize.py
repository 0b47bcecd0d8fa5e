"""initialize: models and optimisers made ready for a level, all of them or none."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bigops.train.amp import casting, current
from bigops.train.amp.casting import Masters
from bigops.train.amp.levels import level as level_of
from bigops.train.amp.optimizer import attach_, stash_of
from bigops.train.loss_scale import LEAST_SCALE, LossScale

FIRST_SCALE = 2.0**16
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}


def initialize(
    models: Any,
    optimizers: Any = None,
    enabled: bool = True,
    opt_level: str = "O1",
    cast_model_type: torch.dtype | None = None,
    patch_torch_functions: bool | None = None,
    keep_batchnorm_fp32: bool | str | None = None,
    master_weights: bool | str | None = None,
    loss_scale: float | str | None = None,
    cast_model_outputs: torch.dtype | None = None,
    num_losses: int = 1,
    verbosity: int = 1,
    min_loss_scale: float | None = None,
    max_loss_scale: float = 2.0**24,
) -> Any:
    """Make models and optimisers ready for mixed precision, in place.

    ===== ========== ========= =============== ======= ============
    level model cast autocast  batch norm fp32 masters loss scale
    ===== ========== ========= =============== ======= ============
    O0    float32                              no      1
    O1               float16                           dynamic
    O2    float16              yes             yes     dynamic
    O3    float16              no              no      1
    O4               bfloat16                          1
    O5    bfloat16             yes             yes     1
    ===== ========== ========= =============== ======= ============

    A model that is cast takes floating inputs in any dtype (`casting.cast` says in which
    containers) and gives float32; its ``state_dict`` is float32. Masters are float32 copies of the
    weights as they are after the cast, and stand in ``optimizer.param_groups`` in their place; the
    model's ``state_dict`` holds them, and ``load_state_dict`` of the model restores them.

    Args:
        models, optimizers: one or a list of each; a model without optimisers is for inference.
        enabled: False: everything comes back untouched, `scale_loss` gives the loss as it is.
        opt_level: of the table.
        cast_model_type, patch_torch_functions, keep_batchnorm_fp32, master_weights, loss_scale: in
            place of what the level says. "True", "False", "dynamic" and numbers as strings are
            taken.
        cast_model_outputs: dtype of floating results instead of float32.
        num_losses: how many scales, by ``loss_id`` of `scale_loss`.
        verbosity: unused.
        min_loss_scale: what a dynamic scale does not fall below; by default 2**-14.
        max_loss_scale: what it does not grow past.

    Returns:
        ``models``, or ``(models, optimizers)``; a list where a list came.

    Raises:
        RuntimeError: an unknown level, a change that it forbids, a model that a parallel wrapper
            holds already (wrap it afterwards) or that has parameters in 16 bits, an optimiser that
            was given twice or before. Nothing was changed.
        TypeError: no model or optimiser. ValueError: a value out of range.
    """
    level = level_of(
        opt_level,
        cast_model_type=cast_model_type,
        patch_torch_functions=patch_torch_functions,
        keep_batchnorm_fp32=keep_batchnorm_fp32,
        master_weights=master_weights,
        loss_scale=loss_scale,
    )
    if not enabled:
        current.run = current.Run(False)
        return models if optimizers is None else (models, optimizers)
    if num_losses < 1:
        raise ValueError(f"num_losses: expected at least 1; got {num_losses}")
    least = LEAST_SCALE if min_loss_scale is None else float(min_loss_scale)
    if not 0 < least <= max_loss_scale:
        raise ValueError(
            "min_loss_scale, max_loss_scale: expected 0 < min <= max; got "
            f"{least}, {max_loss_scale}"
        )
    networks = _models(models)
    steppers = _optimizers(optimizers)

    device = next((p.device for m in networks for p in m.parameters()), torch.device("cpu"))
    dynamic = level.loss_scale == "dynamic"
    first = min(FIRST_SCALE, max_loss_scale) if dynamic else float(level.loss_scale)
    scales = [
        LossScale(first, device, least=least, most=max_loss_scale, dynamic=dynamic)
        for _ in range(num_losses)
    ]
    masters: Masters = {}
    for model in networks:
        outputs = cast_model_outputs or torch.float32
        if level.cast_model_type is not None:
            casting.cast_model_(model, level.cast_model_type, bool(level.keep_batchnorm_fp32))
            casting.hold_state_(model, masters)
        casting.wrap_forward_(
            model, inputs=level.cast_model_type, autocast=level.patched_type, outputs=outputs
        )
    for optimizer in steppers:
        attach_(optimizer, level, scales, masters)
    current.run = current.Run(True, scales)
    models = networks if isinstance(models, list | tuple) else models
    if optimizers is None:
        return models
    return models, steppers if isinstance(optimizers, list | tuple) else optimizers


def state_dict(destination: dict[str, Any] | None = None) -> dict[str, Any]:
    """``loss_scaler0`` and on: {loss_scale, unskipped}, of the last `initialize`.

    Save the model's and the optimiser's beside it; load all three after `initialize`.
    """
    result = OrderedDict() if destination is None else destination
    for i, scale in enumerate(_run("state_dict").scales):
        result[f"loss_scaler{i}"] = {
            "loss_scale": float(scale.value),
            "unskipped": int(scale.good_steps),
        }
    return result


def load_state_dict(state_dict: Mapping[str, Any]) -> None:
    """Take over what `state_dict` gave; another number of scales is a warning.

    Raises:
        RuntimeError: a key that is none of a scale; nothing was loaded.
        ValueError: a scale that is not finite or not above 0, or a count below 0; likewise.
    """
    scales = _run("load_state_dict").scales
    unknown = [key for key in state_dict if not key.startswith("loss_scaler")]
    if unknown:
        raise RuntimeError(f"state_dict: expected keys loss_scaler0 and on; got {unknown}")
    found = list(state_dict.values())
    for key, saved in state_dict.items():
        value, count = saved["loss_scale"], saved["unskipped"]
        if not 0 < value < float("inf") or count < 0:
            raise ValueError(
                f"state_dict: {key}: expected a scale above 0 and a count; got {saved}"
            )
    if len(found) != len(scales):
        warnings.warn(
            f"state_dict: expected {len(scales)} loss scales (num_losses); got {len(found)}",
            stacklevel=2,
        )
    for scale, saved in zip(scales, found, strict=False):
        scale.set(saved["loss_scale"], saved["unskipped"])


def _run(name: str) -> current.Run:
    if current.run is None:
        raise RuntimeError(f"{name}: expected a call of amp.initialize before it; got none")
    return current.run


def _models(models: Any) -> list[nn.Module]:
    result = list(models) if isinstance(models, list | tuple) else [models]
    for i, model in enumerate(result):
        if not isinstance(model, nn.Module):
            raise TypeError(f"models[{i}]: expected an nn.Module; got {type(model).__name__}")
        wrapper = _WRAPPERS & {cls.__name__ for cls in type(model).__mro__}
        if wrapper:
            raise RuntimeError(
                f"models[{i}]: expected a plain model, which is wrapped after amp.initialize; got "
                f"a {wrapper.pop()}"
            )
        for name, param in model.named_parameters():
            if param.dtype in (torch.float16, torch.bfloat16):
                raise RuntimeError(
                    f"models[{i}]: expected float32 parameters, which amp casts; got {param.dtype} "
                    f"for {name}"
                )
    return result


def _optimizers(optimizers: Any) -> list[Optimizer]:
    if optimizers is None:
        return []
    result = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
    for i, optimizer in enumerate(result):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizers[{i}]: expected a torch.optim.Optimizer; got {type(optimizer).__name__}"
            )
        if stash_of(optimizer) is not None or any(optimizer is other for other in result[:i]):
            raise RuntimeError(
                f"optimizers[{i}]: expected one that amp.initialize has not had; got it twice"
            )
    return result
