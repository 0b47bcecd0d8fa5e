"""TrainState: saved whole or not at all, the last few kept, each rank's own random state."""

from __future__ import annotations

import collections
import gc
import json
import math
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bigops import FormatError
from bigops.files import tensors as tensors_file
from bigops.optim.checkpoint import tree
from bigops.parallel import init
from bigops.train import AdamW, Sampler, TrainState, load_checkpoint
from tests.support.ranks import run_ranks


class Counter:
    """A part that may refuse, or have a state that no file holds."""

    def __init__(self, steps: Any = 0) -> None:
        self.steps, self.refuses = steps, False

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses:
            raise KeyError("steps")
        self.steps = state["steps"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != ".save.lock")


def draws() -> list[Any]:
    return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]


# --- what stands in a state -----------------------------------------------------------------

same_types = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.complex_numbers()
)
nested = st.recursive(
    same_types,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.sampled_from(["$tuple"]), inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=12,
)


def there_and_back(value: Any) -> Any:
    writer = tree.Writer()
    return tree.decode(json.loads(json.dumps(writer.encode(value, "x"))), writer.tensors)


def alike(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return repr(a) == repr(b)


@settings(deadline=None, max_examples=100)
@given(nested)
def test_plain_values_come_back_of_their_own_type(value: Any) -> None:
    assert alike(there_and_back(value), value)


def test_tensors_and_arrays_come_back() -> None:
    wide = torch.arange(24.0).reshape(1, 2, 3, 4)
    value = {
        0: wide.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 3).expand(2, 3).contiguous(),
        "bits": [torch.zeros((), dtype=torch.bool), torch.ones(3).to(torch.float8_e4m3fn)],
        "none": torch.empty(0, 3, dtype=torch.bfloat16),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "numbers": (np.float64(0.1), np.int32(3), np.bool_(True)),
        "milestones": collections.Counter({3: 1, 5: 2}),
        "kinds": [torch.float16, torch.device("cpu"), torch.Size([2, 3]), -math.inf],
    }
    bits = value["bits"][1].view(torch.uint8)
    again = there_and_back(value)
    assert torch.equal(again["bits"].pop().view(torch.uint8), bits)
    value["bits"].pop()
    assert alike(again, value)
    twice = there_and_back([wide, wide])
    assert twice[0].data_ptr() == twice[1].data_ptr()  # what was one tensor is one
    for bad, message in (
        (lambda: 1, r"x\.a\.0: expected .*; got function"),
        (torch.ones(2).to_sparse(), r"x\.a\.0: expected a dense tensor"),
        (np.array(["word"]), r"x\.a\.0: expected an array of numbers that torch has; got <U4"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            tree.Writer().encode({"a": [bad]}, "x")


# --- a folder of saves ----------------------------------------------------------------------


def test_random_states_and_values_come_back(tmp_path: Path) -> None:
    state = TrainState(counter=Counter(3))
    state.save(tmp_path / "new" / "run", 5, best=0.5, note=["a", (1, 2)])
    first = draws()
    counter = Counter()
    values = TrainState(counter=counter).load(tmp_path / "new" / "run")
    assert values == {"step": 5, "best": 0.5, "note": ["a", (1, 2)]}
    assert counter.steps == 3
    assert draws() == first


def test_the_last_ones_stay_in_the_order_of_writing(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_text("left alone")
    (tmp_path / ".bigops-state-0.part").write_text("of a killed one")
    (tmp_path / ".bigops-1.part").write_text("of another writer")
    counter = Counter()
    state = TrainState(keep=2, counter=counter)
    for step in (100, 200, 300):
        state.save(tmp_path, step)
    state.load(tmp_path / "000002-step-200.safetensors")
    state.save(tmp_path, 210)  # after a step back
    others = [".bigops-1.part", "mine.safetensors"]
    saves = ["000003-step-300.safetensors", "000004-step-210.safetensors"]
    assert names(tmp_path) == sorted([*others, *saves])
    assert TrainState.latest(tmp_path) == tmp_path / saves[1]
    assert state.load(tmp_path)["step"] == 210
    assert state.load(tmp_path / "none", required=False) == {}
    with pytest.raises(FormatError, match="source: expected a folder with saves"):
        state.load(tmp_path / "none")


@pytest.mark.parametrize("keep", [1, 2, 5, 9, None])
def test_as_many_stay_as_are_asked_for(keep: int | None, tmp_path: Path) -> None:
    state = TrainState(keep=keep)
    for step in range(7):
        state.save(tmp_path, step)
        kept = [int(name.split("-")[2].removesuffix(".safetensors")) for name in names(tmp_path)]
        assert kept == list(range(step + 1))[-(keep or 7) :]


def test_a_save_in_the_background_is_of_its_moment(tmp_path: Path, monkeypatch: Any) -> None:
    model = nn.Linear(3, 2)
    state = TrainState(model=model)
    before, gate, put = model.weight.detach().clone(), threading.Event(), tensors_file._put

    def late(*arguments: Any) -> None:
        assert gate.wait(10)
        put(*arguments)

    monkeypatch.setattr(tensors_file, "_put", late)
    state.save(tmp_path, 1, background=True)
    with torch.no_grad():
        model.weight.zero_()
    assert TrainState.latest(tmp_path) is None
    gate.set()
    state.wait()
    state.load(tmp_path)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_what_was_there(
    background: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    counter = Counter(1)
    state = TrainState(keep=1, counter=counter, tensor=nn.Linear(2, 2))
    state.save(tmp_path, 1)
    held = names(tmp_path)

    def full(file: Any, tensor: Tensor) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors_file, "_put", full)
    if background:
        state.save(tmp_path, 2, background=True)
        with pytest.raises(OSError, match="No space left"):
            state.save(tmp_path, 3)
        TrainState(counter=counter, model=nn.Linear(2, 2)).save(tmp_path, 2, background=True)
        for thread in threading.enumerate():
            if thread.name == "bigops.TrainState":
                thread.join()
        with pytest.warns(UserWarning, match="the last save failed: .*No space"):
            gc.collect()  # nobody asked
    else:
        with pytest.raises(OSError, match="No space left"):
            state.save(tmp_path, 2)
    assert names(tmp_path) == held
    monkeypatch.undo()
    again = TrainState(counter=counter)
    again.save(tmp_path, 2)
    assert again.load(tmp_path)["step"] == 2


def test_a_damaged_save_names_the_one_before_it(tmp_path: Path) -> None:
    counter = Counter(1)
    state = TrainState(counter=counter, model=nn.Linear(2, 2))
    for step in (1, 2):
        state.save(tmp_path, step)
    last = TrainState.latest(tmp_path)
    assert last is not None
    last.write_bytes(last.read_bytes()[:-1])
    counter.steps, before = 7, torch.get_rng_state()
    with pytest.raises(FormatError, match="truncated.*the save before it is 000001-step-1"):
        state.load(tmp_path)
    assert counter.steps == 7
    assert torch.equal(torch.get_rng_state(), before)
    assert state.load(tmp_path / "000001-step-1.safetensors")["step"] == 1


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    TrainState(model=nn.Linear(3, 2), counter=Counter(1)).save(tmp_path, 1)
    counter, model = Counter(5), nn.Linear(3, 2)
    other = TrainState(counter=counter, model=nn.Linear(4, 2))
    weight, random_state = model.weight.detach().clone(), torch.get_rng_state()
    with pytest.raises(FormatError, match=r"model: weight expected shape \(2, 4\); got \(2, 3\)"):
        other.load(tmp_path)
    late = Counter()
    late.refuses = True
    with pytest.raises(FormatError, match="parts: .* holds .*, not .*'ema'"):
        TrainState(model=model, ema=Counter()).load(tmp_path)
    with pytest.raises(FormatError, match="counter: KeyError"):
        TrainState(model=model, counter=late).load(tmp_path)
    assert torch.equal(model.weight, weight)
    assert counter.steps == 5
    assert torch.equal(torch.get_rng_state(), random_state)


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="step: expected an object with state_dict .*; got int"):
        TrainState(step=3)
    with pytest.raises(ValueError, match="keep: expected at least 1"):
        TrainState(keep=0)
    with pytest.raises(ValueError, match=r"per_rank: expected names out of \['a'\]"):
        TrainState(a=Counter(), per_rank=["b"])
    with pytest.raises(TypeError, match="counter.steps: expected .*; got function"):
        TrainState(counter=Counter(lambda: 1)).save(tmp_path, 1)
    with pytest.raises(ValueError, match="step: expected a whole number from 0 on; got -1"):
        TrainState().save(tmp_path, -1)
    assert list(tmp_path.iterdir()) == []


# --- wrapped models -------------------------------------------------------------------------


def test_keys_are_those_of_the_model_itself(tmp_path: Path) -> None:
    """Of a compiled model, of one with a compiled layer, and of one with a layer named module."""

    def make() -> nn.Sequential:
        inner = nn.Sequential(collections.OrderedDict(module=nn.Linear(3, 2), bn=nn.BatchNorm1d(2)))
        return nn.Sequential(inner, nn.Linear(2, 2))

    plain = make()
    whole = torch.compile(make())
    part = make()
    part[0] = torch.compile(part[0])
    parallel = nn.DataParallel(make())
    keys = set(plain.state_dict())
    for wrapped in (whole, part, parallel):
        TrainState(model=wrapped).save(tmp_path, 1)
        _, tensors = tensors_file.read(TrainState.latest(tmp_path), "bigops.state", "a test")
        stored = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
        assert stored == keys
        for other in (plain, whole, part, parallel):
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(1)
            TrainState(model=other).load(tmp_path)
            for a, b in zip(
                other.state_dict().values(), wrapped.state_dict().values(), strict=True
            ):
                assert torch.equal(a, b)


# --- ranks ----------------------------------------------------------------------------------


def rank(folder: str) -> None:
    """What one of two ranks does."""
    with init() as world:
        _run(Path(folder), world.rank)


def _run(folder: Path, me: int) -> None:
    run = folder / "run"
    torch.manual_seed(me)
    random.seed(me)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
    torch.manual_seed(10 + me)
    optimizer = AdamW(model.parameters())
    sampler = Sampler(20, 4, rank=me, world_size=2)
    loader = Counter(100 + me)
    parts = {"model": model, "optimizer": optimizer, "sampler": sampler, "loader": loader}
    state = TrainState(**parts, per_rank=["loader"])
    for _ in sampler:
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        break
    state.save(run, 1, background=True)
    expected, weight = draws(), model.module.weight.detach().clone()
    state.wait()
    with torch.no_grad():
        model.module.weight.zero_()
    loader.steps = sampler.epoch = 9
    assert state.load(run) == {"step": 1}
    assert draws() == expected
    assert torch.equal(model.module.weight, weight)
    assert (loader.steps, sampler.epoch, sampler.samples_seen) == (100 + me, 0, 4)

    # one that refuses, and one whose state no file holds, are errors of both
    loader.refuses, loader.steps = me == 1, 3
    before = torch.get_rng_state()
    with pytest.raises(FormatError, match="loader: KeyError"):
        state.load(run)
    assert loader.steps == 3
    assert torch.equal(torch.get_rng_state(), before)
    loader.steps = (lambda: 1) if me == 1 else 3
    with pytest.raises(TypeError, match="loader.steps: expected .*; got function"):
        state.save(run, 2)

    # a disk that is full for the first rank
    loader.steps = 3
    put = tensors_file._put
    tensors_file._put = lambda *_: exec("raise OSError(28, 'No space left')")
    with pytest.raises(OSError, match="No space left"):
        state.save(run, 2)
    tensors_file._put = put

    shared = TrainState(model=model, optimizer=optimizer, sampler=sampler)
    shared.save(folder / "shared", 1)
    drawn = draws()
    assert shared.load(folder / "single", elastic=True) == {"step": 7}
    print(json.dumps([drawn, draws()]))


def test_two_ranks_save_together(tmp_path: Path) -> None:
    """And 1 -> 2 -> 1: ranks that come new have random states that are nobody else's."""
    torch.manual_seed(99)
    model = nn.Linear(4, 2)
    parts = {"model": model, "optimizer": AdamW(model.parameters()), "sampler": Sampler(20, 4)}
    state = TrainState(**parts)
    state.save(tmp_path / "single", 7)
    mine = draws()
    code = f"from tests.optim.test_train_state import rank; rank({str(tmp_path)!r})"
    (first, first_then), (second, second_then) = [
        json.loads(out.splitlines()[-1]) for out in run_ranks("-c", code)
    ]
    assert first != second
    assert first_then == mine
    assert second_then not in (mine, first, second)
    assert names(tmp_path / "run") == ["000001-step-1.safetensors"]

    folder = tmp_path / "shared"
    with pytest.raises(FormatError, match=r"expected the state of 1 rank\(s\); got that of 2"):
        state.load(folder)
    with pytest.raises(FormatError, match="expected parts that any number of ranks shares"):
        TrainState(loader=Counter(), per_rank=["loader"]).load(tmp_path / "run", elastic=True)
    state.load(folder, elastic=True)
    assert draws() == first
    assert parts["sampler"].samples_seen == 4
    assert load_checkpoint(TrainState.latest(folder), model=model)["step"] == 1
