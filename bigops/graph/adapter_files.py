"""Adapters of a model in the files of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigops.files import FormatError, replacing
from bigops.files import tensors as tensors_file
from bigops.graph.add_lora import add_lora_, with_adapters
from bigops.graph.atomic import atomic

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {"a": "lora_A", "b": "lora_B"}
# What would make it another sum than base + scale * b @ a.
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
}


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model: str | None = None,
) -> None:
    """Write an adapter as PEFT does; ``PeftModel.from_pretrained(base, folder)`` loads it.

    Args:
        model: has `LoRALinear` or `QLoRALinear` layers, as `add_lora_` makes them.
        folder: is made; the two files in it are replaced.
        name: which adapter.
        base_model: name or path of the base, which PEFT's AutoPeftModel classes load.

    Raises:
        ValueError: no layer has such an adapter; nothing is written.
        OSError: the folder cannot be written.
    """
    found = {
        path: layer._adapter(name)
        for path, module in model.named_modules()
        if (layer := with_adapters(module)) is not None and name in layer.adapters
    }
    if not found:
        raise ValueError(f"name: expected an adapter of the model; got {name!r}")
    ranks = {path: adapter.rank for path, adapter in found.items()}
    alphas = {path: adapter.scale * adapter.rank for path, adapter in found.items()}
    first = next(iter(found))
    config = {
        **_PLAIN,
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": found[first].dropout,
        "use_rslora": False,
        "target_modules": sorted(found),
        "rank_pattern": {p: rank for p, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {p: alpha for p, alpha in alphas.items() if alpha != alphas[first]},
    }
    weights = {
        f"{_PREFIX}{path}.{_FACTORS[factor]}.weight": value.detach().cpu().contiguous()
        for path, adapter in found.items()
        for factor, value in adapter.named_parameters()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors_file.write(folder / _WEIGHTS, weights, {"format": "pt"})
    with replacing(folder / _CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True))


@atomic
def load_adapter_(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Add an adapter that `save_adapter` or PEFT wrote, and freeze every other parameter.

    Args:
        model: the base, with or without other adapters; layers are swapped as by `add_lora_`.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: of the adapter in the model, one that is not taken.

    Raises:
        FormatError: no such files, a kind of adapter other than plain LoRA, a layer that the model
            does not have or has in another shape. The model is as before.
        ValueError, TypeError: as `add_lora_`.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / _CONFIG).read_text())
        weights = load_file(folder / _WEIGHTS)
    except Exception as error:  # SafetensorError and others
        raise FormatError(
            f"{folder}: expected {_CONFIG} and {_WEIGHTS}; got {type(error).__name__}: {error}"
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise FormatError(f"{folder}: expected peft_type 'LORA'; got {kind!r}")
    for option, plain in _PLAIN.items():
        if config.get(option, plain) not in (plain, None, [], {}):
            raise FormatError(f"{folder}: expected {option} {plain!r}; got {config[option]!r}")
    factors = _factors(folder, weights)
    _check(folder, model, factors)
    groups: dict[tuple[int, float], list[str]] = {}
    for path, (a, _) in factors.items():
        groups.setdefault((len(a), _alpha(config, path)), []).append(path)
    for (rank, alpha), paths in groups.items():
        add_lora_(
            model,
            rank,
            [glob.escape(path) for path in paths],
            alpha,
            float(config.get("lora_dropout") or 0.0),
            name,
            bool(config.get("use_rslora")),
        )
    with torch.no_grad():
        for path, both in factors.items():
            adapter: Any = model.get_submodule(path).get_submodule(f"adapters.{name}")
            for parameter, value in zip((adapter.a, adapter.b), both, strict=True):
                parameter.copy_(value)


def _factors(folder: Path, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """a and b by the path of the layer."""
    rest = dict(weights)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key in weights:
        head, mark, _ = key.partition(f".{_FACTORS['a']}.weight")
        other = f"{head}.{_FACTORS['b']}.weight"
        if mark and key.startswith(_PREFIX) and other in rest:
            found[head.removeprefix(_PREFIX)] = rest.pop(key), rest.pop(other)
    if rest or not found:
        raise FormatError(f"{folder}: expected pairs of lora_A and lora_B; got {sorted(rest)[:4]}")
    return found


def _check(folder: Path, model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    layers = dict(model.named_modules(remove_duplicate=False))
    for path, (a, b) in factors.items():
        layer: Any = layers.get(path)
        if not isinstance(layer, nn.Linear):
            got = "none" if layer is None else type(layer).__name__
            raise FormatError(f"{folder}: expected a linear layer {path}; got {got}")
        shapes = [len(a), layer.in_features], [layer.out_features, len(a)]
        if (list(a.shape), list(b.shape)) != shapes:
            raise FormatError(
                f"{folder}: {path}: expected factors of shapes {shapes[0]} and {shapes[1]}; got "
                f"{list(a.shape)} and {list(b.shape)}"
            )


def _alpha(config: dict[str, Any], path: str) -> float:
    """PEFT's: a pattern is the end of a path."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if path == pattern or path.endswith(f".{pattern}"):
            return float(alpha)
    return float(config["lora_alpha"])
