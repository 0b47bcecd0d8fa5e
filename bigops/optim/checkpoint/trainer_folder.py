"""The folder ``checkpoint-N`` that transformers' Trainer writes, read where it is plain.

Model (safetensors, in one file or several), optimizer.pt, scheduler.pt, scaler.pt and the random
states of ranks; what torch or numpy pickled is read by an unpickler that builds tensors, arrays and
plain containers only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bigops.files import FormatError

_STATE = "trainer_state.json"


def is_one(folder: Path) -> bool:
    return (folder / _STATE).is_file()


def read(folder: Path, map_location: str) -> dict[str, Any]:
    """What such a folder holds, as `one_file.read` gives it: scheduler also as ``schedule``.

    Raises:
        FormatError: a file in it that is damaged, or of another kind.
    """
    file = folder / _STATE
    try:
        trainer = json.loads(file.read_text())
        values = {"step": int(trainer["global_step"]), "epoch": trainer.get("epoch")}
        states: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        file = folder
        for file in sorted(folder.glob("model*.safetensors")):
            tensors.update(load_file(file, device=map_location))
        if tensors:
            states["model"] = tensors
        for name in ("optimizer", "scheduler", "scaler"):
            file = folder / f"{name}.pt"
            if file.exists():
                states[name] = torch.load(file, map_location=map_location, weights_only=True)
        if "scheduler" in states:
            states["schedule"] = states["scheduler"]
        ranks = []
        for file in sorted(folder.glob("rng_state*.pth"), key=lambda f: (len(f.name), f.name)):
            ranks.append({"rng": _random_states(file), "states": {}})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged archive may raise nearly anything
        raise FormatError(
            f"{file}: expected what transformers' Trainer writes; got {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error
    if not ranks:
        raise FormatError(f"{folder}: expected rng_state.pth of transformers' Trainer; got none")
    return {"states": states, "values": values, "ranks": ranks}


def _random_states(file: Path) -> dict[str, Any]:
    array = np.zeros(1, np.uint32)
    made_of: list[Any] = [array.__reduce__()[0], np.ndarray, np.dtype, type(array.dtype)]
    with torch.serialization.safe_globals(made_of):
        found = torch.load(file, map_location="cpu", weights_only=True)
    cuda = found.get("cuda", [])
    own = {name: found[name] for name in ("cpu", "numpy", "python") if name in found}
    return {**own, "cuda": [cuda] if isinstance(cuda, torch.Tensor) else list(cuda)}
