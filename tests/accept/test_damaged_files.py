"""Damaged files: each is refused by FormatError, or the damage is harmless and the bits are right.

Half of the damage is the world's (flipped bits, lost ends, mixed files); the other half is made
with fresh checksums, or as in files from before there were any, so that the checks behind them are
met.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from bigops import FormatError, load, save
from bigops.compress import file_format, structure
from bigops.compress.store import load_compressed
from bigops.train import AdamW, MixedPrecision, load_checkpoint, save_checkpoint
from tests.accept.conftest import Accept
from tests.support import saved_models as saved

pytestmark = pytest.mark.slow

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    1 << 40,
    1 << 70,
    0.5,
    float("inf"),
    "",
    "none",
    "x",
    "bigops",
    [],
    [0],
    ["x"],
    [[0]],
    {},
    {"x": 1},
    {"kind": "Identity", "args": {}},
]


def _sites(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inner = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for key, value in inner:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += _sites(value, (*path, key))
    return found


def _edit_header(rng: random.Random, header: dict[str, Any]) -> None:
    *path, last = rng.choice(_sites(header))
    at: Any = header
    for key in path:
        at = at[key]
    kind = rng.randrange(4)
    if kind == 0:
        at.pop(last)
    elif kind == 1 and isinstance(at, dict):
        at[rng.choice(["x", "0", "0.weight", "y_grid", "device", "dtype"])] = at.pop(last)
    elif kind == 2 and type(at[last]) is int:
        at[last] += rng.choice([-1, 1])
    else:
        at[last] = rng.choice(VALUES)


def _edit_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    kind = rng.randrange(5)
    if kind == 0:
        tensors.pop(name)
    elif kind == 1:
        tensors[name] = t.reshape(-1)[: rng.randrange(t.numel() + 1)]
    elif kind == 2:
        tensors[name] = t.to(rng.choice([torch.int32, torch.float32, torch.uint8, torch.bool]))
    elif kind == 3:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], t
    elif t.numel():
        tensors[name] = torch.where(torch.rand(t.shape) < 0.3, t, t.flatten()[0])


def _rewritten(rng: random.Random, path: Path) -> None:
    """Change the header's JSON or the tensors; with right checksums or with none."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["bigops"])
    if rng.randrange(3):
        _edit_header(rng, header)
    else:
        _edit_tensors(rng, tensors)
    tensors = {name: t.clone() for name, t in tensors.items()}
    if isinstance(header, dict) and header.pop("format", None) == file_format.FORMAT:
        file_format.write(path, tensors, header, None)
    else:
        file_format.write(path, tensors, {"format": rng.choice(VALUES), **header}, None)


def _damaged(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bytes of a file as a disk, a cable or a script may leave them."""
    raw = bytearray(data)
    kind = rng.randrange(6)
    if kind <= 1:
        for _ in range(rng.choice([1, 1, 1, 3])):
            end = len(raw) if kind else min(len(raw), 4000)
            raw[rng.randrange(end)] ^= 1 << rng.randrange(8)
        return bytes(raw)
    if kind == 2:
        return bytes(raw[: rng.randrange(len(raw))])
    if kind == 3:
        at = rng.randrange(len(raw))
        return bytes(raw[:at]) + rng.randbytes(rng.choice([1, 8, 64])) + bytes(raw[at:])
    if kind == 4:
        at = rng.randrange(len(raw))
        raw[at : at + 16] = bytes(16)
        return bytes(raw)
    if data[:2] == b"PK":
        cut = rng.randrange(min(len(data), len(other)))
        return data[:cut] + other[cut:]
    size, theirs = (struct.unpack("<Q", part[:8])[0] for part in (data, other))
    return other[: 8 + theirs] + data[8 + size :]


def _snapshot(model: nn.Module) -> list[Any]:
    return [
        *((n, id(m), m.training) for n, m in model.named_modules()),
        *((n, id(p), p._version, p.requires_grad) for n, p in model.named_parameters()),
        *((n, id(b), b._version) for n, b in model.named_buffers()),
    ]


def test_damaged_models(tmp_path: Path, accept: Accept) -> None:
    rng = random.Random(0)
    sources = []
    for name in saved.FORMATS:
        for freeze in (True, False):
            model = saved.compressed(name, freeze)
            save(model, tmp_path / "m")
            sources.append((model, name, (tmp_path / "m").read_bytes()))
    refused = harmless = 0
    for case in range(accept.count(2000)):
        model, name, data = sources[case % len(sources)]
        path = tmp_path / f"case-{case % 4}"
        path.write_bytes(data)
        own = case % 2 == 0
        if own:
            path.write_bytes(_damaged(rng, data, rng.choice(sources)[2]))
        else:
            _rewritten(rng, path)
        given = saved.compressed(saved.DENSE)
        before = _snapshot(given)
        for target in (None, given):
            try:
                again = load(path, model=target)
            except FormatError:
                refused += 1
                assert _snapshot(given) == before, (case, name)
            else:
                harmless += 1
                # With checksums of its own a changed file may be a whole one of another model.
                if own:
                    assert saved.same_state(again, saved.state_of(model)), (case, name)
                    assert structure.describe(again) == structure.describe(model), (case, name)
                # A whole model of other sizes, or of another order, may refuse x; it may not crash.
                with torch.no_grad(), contextlib.suppress(ValueError, TypeError, RuntimeError):
                    again.eval()(torch.randn(3, saved.K))
        with contextlib.suppress(FormatError):
            load_compressed(path)
    accept.result(cases=accept.count(2000), refused=refused, harmless=harmless, wrong=0)


def test_damaged_checkpoints(tmp_path: Path, accept: Accept) -> None:
    rng = random.Random(1)
    path = tmp_path / "c.pt"

    def parts(steps: int) -> dict[str, Any]:
        model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        optimizer, precision = AdamW(model.parameters()), MixedPrecision("fp16-mixed")
        for _ in range(steps):
            precision.backward(model(torch.randn(4, 8)).square().sum())
            precision.step(optimizer)
        return {"model": model, "optimizer": optimizer, "precision": precision}

    def tensors_of(made: dict[str, Any]) -> list[torch.Tensor]:
        states = made["optimizer"].state_dict()["state"]
        return [
            *(t.clone() for t in made["model"].state_dict().values()),
            *(t.clone() for of in states.values() for t in of.values()),
            torch.tensor(made["precision"].scale),
        ]

    whole = parts(2)
    save_checkpoint(path, **whole)
    data = path.read_bytes()
    save_checkpoint(path, **parts(1))
    other = path.read_bytes()
    right, refused, harmless = tensors_of(whole), 0, 0
    for case in range(accept.count(2000)):
        damaged = _damaged(rng, data, other)
        if damaged in (data, other):  # cut where both are alike: a whole file
            continue
        path.write_bytes(damaged)
        given = parts(0)
        before, random_state = tensors_of(given), torch.get_rng_state()
        try:
            load_checkpoint(path, **given)
        except FormatError:
            refused += 1
            expected = before
            assert torch.equal(torch.get_rng_state(), random_state), case
        else:
            harmless += 1
            expected = right
        got = tensors_of(given)
        assert len(got) == len(expected), case
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), case
    accept.result(cases=accept.count(2000), refused=refused, harmless=harmless, wrong=0)
