"""Checkpoints: all of one is loaded or nothing of it, whichever part refuses."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigops import FormatError, Int8, Sparse, compress_
from bigops.files import tensors as tensors_file
from bigops.optim.checkpoint import tree
from bigops.train import AdamW, MixedPrecision, load_checkpoint, save_checkpoint

ENTRY = "bigops.state"
GOLDEN = Path(__file__).parents[1] / "golden" / "saved" / "checkpoint.pt"


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))


def _parts(steps: int = 2, precision: str = "fp16-mixed") -> dict[str, Any]:
    model, mixed = _model(), MixedPrecision(precision)
    optimizer = AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(steps):
        mixed.backward(model(torch.randn(4, 8)).square().sum())
        mixed.step(optimizer)
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "precision": mixed, "scheduler": scheduler}


def _state(parts: dict[str, Any]) -> Any:
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


class Refuses:
    """A part that changes itself and then refuses."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.steps, self.tensor = error, 0, torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.tensor.copy_(state["tensor"])
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class Slots:
    """A part without a ``__dict__``."""

    __slots__ = ("steps",)

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Late(nn.Linear):
    """A layer that refuses after its tensors were written."""

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        raise IndexError("late")


def _two_groups(parts: dict[str, Any]) -> None:
    first, *rest = parts["model"].parameters()
    parts["optimizer"] = AdamW([{"params": [first]}, {"params": rest}])


def _late(parts: dict[str, Any]) -> None:
    parts["model"][2] = Late(6, 4)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "optimiser of two groups": (_two_groups, "optimizer: .*group"),
    "another precision": (
        lambda p: p.update(precision=MixedPrecision("bf16-mixed")),
        "precision: .*fp16-mixed",
    ),
    "a part that refuses": (
        lambda p: p.update(meter=Refuses(KeyError("steps"))),
        "meter: KeyError: 'steps'",
    ),
    "a layer that refuses late": (_late, "model: IndexError: late"),
    "a layer of whole numbers": (
        lambda p: p["model"].register_buffer("extra", torch.zeros(1)),
        "model: only the model has",
    ),
}


@pytest.mark.parametrize("last", ["model", "optimizer", "scheduler"])
@pytest.mark.parametrize("case", CHANGES)
def test_whichever_part_refuses_nothing_is_loaded(case: str, last: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", **_parts(), meter=Refuses())
    parts = _parts(0)
    change, message = CHANGES[case]
    change(parts)
    parts[last] = parts.pop(last)  # the order in which they are loaded
    before, random_state = _state(parts), torch.get_rng_state()
    parts["precision"]._has_backward = True  # no part of its state
    with pytest.raises(FormatError, match=message):
        load_checkpoint(tmp_path / "c", **parts)
    assert _same(_state(parts), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert parts["precision"]._has_backward


def test_a_part_with_slots_is_loaded_and_set_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", counter=Slots(3), meter=Refuses())
    counter = Slots(0)
    with pytest.raises(FormatError, match="meter"):
        load_checkpoint(tmp_path / "c", counter=counter, meter=Refuses(KeyError("steps")))
    assert counter.steps == 0
    load_checkpoint(tmp_path / "c", counter=counter)
    assert counter.steps == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit()])
def test_an_interrupted_load_sets_all_back(error: BaseException, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", **_parts(), meter=Refuses())
    parts = {**_parts(1), "meter": Refuses(error)}
    before, tensors = _state(parts), list(parts["model"].parameters())
    states = [parts["optimizer"].state[p] for p in tensors]
    with pytest.raises(type(error)):
        load_checkpoint(tmp_path / "c", **parts)
    assert _same(_state(parts), before)
    assert all(a is b for a, b in zip(parts["model"].parameters(), tensors, strict=True))
    assert all(a is parts["optimizer"].state[p] for a, p in zip(states, tensors, strict=True))


def test_torchs_optimisers_are_set_back(tmp_path: Path) -> None:
    def make(groups: int) -> dict[str, Any]:
        model = _model()
        params = list(model.parameters())
        split = [{"params": params[:1]}, {"params": params[1:]}] if groups == 2 else params
        optimizer = torch.optim.Adam(split)
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        return {"optimizer": optimizer, "model": model, "meter": Refuses()}

    save_checkpoint(tmp_path / "c", **make(1))
    for parts in (make(2), {**make(1), "meter": Refuses(TypeError("no"))}):
        before = _state(parts)
        with pytest.raises(FormatError):
            load_checkpoint(tmp_path / "c", **parts)
        assert _same(_state(parts), before)


def test_compressed_layers_are_set_back(tmp_path: Path) -> None:
    def make(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
        compress_(model, {"0": Int8(), "1": Sparse(0.5)}, freeze=True)
        return model

    save_checkpoint(tmp_path / "c", model=make(0), meter=Refuses())
    model = make(0)
    with torch.no_grad():
        model[0].bias.add_(1)
    before = _state({"model": model})
    buffers = [id(b) for b in model.buffers()]
    with pytest.raises(FormatError):
        load_checkpoint(tmp_path / "c", model=model, meter=Refuses(ValueError("no")))
    assert _same(_state({"model": model}), before)
    assert [id(b) for b in model.buffers()] == buffers


def test_a_flipped_bit_of_any_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, **_parts(), note="x" * 100)
    data = path.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:head])
    places = [data.index(b"x" * 100), data.index(b"$tuple"), *range(9, head - 100, head // 50)]
    places += [
        head + (sum(of["data_offsets"]) // 2)
        for name, of in tensors.items()
        if name != "__metadata__"
    ]
    assert len(places) > 60
    parts = _parts(0)
    before = _state(parts)
    for place in places:
        raw = bytearray(data)
        raw[place] ^= 0x10
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=str(path)):
            load_checkpoint(path, **parts)
    for size in (0, 3, 8, head - 1, head, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match="truncated"):
            load_checkpoint(path, **parts)
    assert _same(_state(parts), before)


FORMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no states": (lambda c: c.pop("states"), "lacks some"),
    "values of a list": (lambda c: c.update(values=[1]), "lacks some"),
    "no ranks": (lambda c: c.update(ranks=[]), "lacks some"),
    "no random states": (lambda c: c["ranks"][0].pop("rng"), "lacks some"),
    "a random state of three bytes": (
        lambda c: c["ranks"][0]["rng"].update(cpu=torch.zeros(3, dtype=torch.uint8)),
        "random states",
    ),
    "a random state of None": (lambda c: c["ranks"][0]["rng"].update(cpu=None), "random states"),
    "numpy's of a list": (lambda c: c["ranks"][0]["rng"].update(numpy=[1]), "random states"),
    "Python's of two": (lambda c: c["ranks"][0]["rng"].update(python=(3, ())), "random states"),
    "a kind that is none": (lambda c: c["values"].update(note="<$lambda>"), "kind .lambda"),
    "a dtype that is none": (lambda c: c["values"].update(note="<$dtype>"), "dtype"),
    "another format": (lambda c: c.update(format="bigops.state.9"), "of format bigops.state.2"),
    "a model of a list": (lambda c: c["states"].update(model=[1]), "a state by names; got list"),
    "a weight of a number": (
        lambda c: c["states"]["model"].update({"0.bias": 3}),
        "0.bias expected a tensor; got int",
    ),
    "a weight of whole numbers": (
        lambda c: c["states"]["model"].update({"0.bias": torch.zeros(6, dtype=torch.int8)}),
        "0.bias expected torch.float32; got torch.int8",
    ),
    "an optimiser of None": (lambda c: c["states"].update(optimizer=None), "optimizer: "),
    "a scaler without a scale": (
        lambda c: c["states"]["precision"]["scaler"].pop("scale"),
        "precision: .*scale",
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_contents_of_another_form_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, **_parts())
    entries, tensors = tensors_file.read(path, ENTRY, "a test")
    content = tree.decode(json.loads(entries[ENTRY]), tensors)
    change, message = FORMS[case]
    change(content)
    writer = tree.Writer()
    text = json.dumps({name: writer.encode(value, name) for name, value in content.items()})
    tensors_file.write(
        path, writer.tensors, {ENTRY: re.sub(r'"<(.\w+)>"', r'{"\1": "load"}', text)}
    )
    parts = _parts(1)
    before, random_state = _state(parts), torch.get_rng_state()
    with pytest.raises(FormatError, match=message) as caught:
        load_checkpoint(path, **parts)
    assert str(path) in str(caught.value)
    assert _same(_state(parts), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_versions_of_the_state_travel(tmp_path: Path) -> None:
    class Versioned(nn.Linear):
        _version = 4

        def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
            assert local["version"] == 4
            super()._load_from_state_dict(state, prefix, local, *rest)

    save_checkpoint(tmp_path / "c", model=nn.Sequential(Versioned(2, 2)))
    load_checkpoint(tmp_path / "c", model=nn.Sequential(Versioned(2, 2)))


def test_a_checkpoint_of_an_earlier_version_loads() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    optimizer, precision = AdamW(model.parameters()), MixedPrecision("bf16-mixed")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    parts = {"model": model, "optimizer": optimizer, "precision": precision}
    values = load_checkpoint(GOLDEN, **parts, scheduler=scheduler)
    assert values == {"epoch": 2, "note": {"lr": [0.1, 0.2]}}
    stored = torch.load(GOLDEN, weights_only=True)["states"]
    assert _same(dict(model.state_dict()), dict(stored["model"]))
    assert _same(optimizer.state_dict()["state"], stored["optimizer"]["state"])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(FormatError, match=r"no readable checkpoint \(it is no file\)"):
            load_checkpoint(tmp_path / name)
