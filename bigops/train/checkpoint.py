"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_FORMAT = "bigops.checkpoint.1"


def save_checkpoint(path: str | Path, **parts: Any) -> None:
    """Write a checkpoint; a crash or a full disk leaves the old file as it was.

    Args:
        path: the file. It is written beside itself and renamed.
        **parts: what to save, by name: objects with ``state_dict`` (model, optimizer,
            MixedPrecision, scheduler) or plain values (numbers, strings, tensors, lists and dicts
            of them). torch's random states (CPU and every GPU) are saved in any case.

    Raises:
        TypeError: a plain value that ``load_checkpoint`` could not read back.
    """
    path = Path(path)
    content = {
        "format": _FORMAT,
        "states": {k: v.state_dict() for k, v in parts.items() if hasattr(v, "state_dict")},
        "values": {k: v for k, v in parts.items() if not hasattr(v, "state_dict")},
        "rng": {"cpu": torch.get_rng_state(), "cuda": _cuda_rng()},
    }
    for name, value in content["values"].items():  # type: ignore[attr-defined]
        _check_plain(name, value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C included: no half file stays behind
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(
    path: str | Path, *, rng: bool = True, map_location: str = "cpu", **parts: Any
) -> dict[str, Any]:
    """Read a checkpoint into the objects given; the counterpart of ``save_checkpoint``.

    Args:
        path: the file.
        rng: whether to restore torch's random states.
        map_location: device on which tensors are read before they are copied into place.
        **parts: the objects to load into, under the names they were saved with.

    Returns:
        The plain values that were saved, by name.

    Raises:
        ValueError: no such checkpoint, a damaged or foreign file, a part that it does not hold,
            or a model with other parameters; nothing is loaded then.
    """
    try:
        # weights_only: an unpickler that builds tensors and plain containers only.
        content = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"path: expected a checkpoint, {path} does not exist") from None
    except Exception as error:  # a damaged archive may raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"path: {path} is no readable checkpoint ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"path: expected a file of format {_FORMAT}, {path} is something else")
    states = content["states"]
    missing = sorted(set(parts) - set(states))
    if missing:
        raise ValueError(f"parts: {path} holds {sorted(states)}, not {missing}")
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            _check_module(name, part, states[name])
    for name, part in parts.items():
        part.load_state_dict(states[name])
    if rng:
        torch.set_rng_state(content["rng"]["cpu"].cpu())
        if content["rng"]["cuda"] and len(content["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in content["rng"]["cuda"]])
    return content["values"]


def _cuda_rng() -> list[torch.Tensor]:
    # get_rng_state_all initialises CUDA, which a CPU run must not pay for.
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _check_plain(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(name, key)
            _check_plain(name, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(name, item)
    elif not (value is None or type(value) in (bool, int, float, str, torch.Tensor)):
        raise TypeError(
            f"{name}: expected an object with state_dict, or numbers, strings, tensors and "
            f"lists or dicts of them; got {type(value).__name__}"
        )


def _check_module(name: str, module: torch.nn.Module, state: dict[str, Any]) -> None:
    """``load_state_dict`` copies before it complains: compare first."""
    own = module.state_dict()
    for key in sorted(set(own) ^ set(state)):
        where = "the file" if key in state else "the model"
        raise ValueError(f"{name}: only {where} has {key!r}")
    for key, value in own.items():
        if isinstance(value, torch.Tensor) and value.shape != state[key].shape:
            raise ValueError(
                f"{name}: {key} expected shape {tuple(value.shape)}; got {tuple(state[key].shape)}"
            )
