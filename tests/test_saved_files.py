"""What a saved file keeps, what it refuses to hold, and how damage is met."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigops import FormatError, Int8, compress_, load, save
from bigops.compress import arguments, file_format, structure
from bigops.compress.store import load_compressed, read_header
from bigops.nn import GatedMLP, Linear, LowRankLinear, QuantLowRankLinear
from tests import saved_models as saved

GOLDEN = Path(__file__).parent / "golden" / "saved"


# --- files of earlier versions --------------------------------------------------------------


@pytest.mark.parametrize("name", ["kinds", "frozen", "trainable", "states"])
def test_files_from_before_there_were_checksums_load_bit_for_bit(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"bigops"}
        header = json.loads(file.metadata()["bigops"])
    model = load(path)
    state = model.state_dict()
    assert set(state) == set(tensors) | set(header["tied"])
    assert all(torch.equal(state[n].view(torch.uint8), t.view(torch.uint8))
               for n, t in tensors.items() if t.numel() and t.dim())  # fmt: skip
    assert structure.describe(model) == header["tree"]
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(header["fixed"])
    for layer in load_compressed(path).values():
        assert not any(t.is_meta for t in [*layer.parameters(), *layer.buffers()])


# --- round trips ----------------------------------------------------------------------------


def test_every_kind_and_every_format_comes_back(tmp_path: Path) -> None:
    for make in (saved.every_kind, saved.every_format, lambda: saved.every_format(False)):
        model = make()
        save(model, tmp_path / "m")
        again = load(tmp_path / "m")
        assert saved.same_state(again, saved.state_of(model))
        assert structure.describe(again) == structure.describe(model)
    assert set(structure.KINDS) == {
        *saved.KINDS, "Sequential", "ModuleList", "ModuleDict", "bigops.QuantLinear",
        "bigops.Fp8Linear", "bigops.SparseLinear", "bigops.QuantLowRankLinear",
        "bigops.LowRankLinear",
    }  # fmt: skip


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def modules(draw: st.DrawFn, depth: int = 2) -> nn.Module:
    kind = draw(st.sampled_from([*saved.KINDS, "format", "Sequential", "ModuleList", "ModuleDict"]))
    if kind == "format":
        name, freeze = draw(st.sampled_from(list(saved.FORMATS))), draw(st.booleans())
        return saved.compressed(name, freeze)
    if kind in saved.KINDS:
        size = draw(st.integers(0, 3))
        if kind == "torch.Linear":
            return nn.Linear(draw(st.integers(0, 3)), size, draw(st.booleans()))
        made = saved.KINDS[kind]()
        return made.to(draw(st.sampled_from(DTYPES)))
    children = draw(st.lists(modules(depth - 1), max_size=3)) if depth else []
    if kind == "ModuleDict":
        names = st.text("aå/ \\\"'🎈_", min_size=1, max_size=4)
        keys = draw(st.lists(names, min_size=len(children), max_size=len(children), unique=True))
        return nn.ModuleDict(dict(zip(keys, children, strict=True)))
    return nn.Sequential(*children) if kind == "Sequential" else nn.ModuleList(children)


@settings(max_examples=25, deadline=None)
@given(model=modules(), data=st.data())
def test_any_tree_of_known_modules_comes_back(tmp_path_factory, model, data) -> None:  # type: ignore[no-untyped-def]
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    for layer in linears:  # ties
        same = [o for o in linears if o.weight.shape == layer.weight.shape]
        layer.weight = data.draw(st.sampled_from(same)).weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and data.draw(st.booleans()))
    model.train(data.draw(st.booleans()))
    path = tmp_path_factory.mktemp("tree") / "m"
    save(model, path)
    again = load(path)
    assert saved.same_state(again, saved.state_of(model))
    assert structure.describe(again) == structure.describe(model)
    assert again.training == model.training
    flags = [(n, p.requires_grad, p.dtype) for n, p in model.named_parameters()]
    assert [(n, p.requires_grad, p.dtype) for n, p in again.named_parameters()] == flags


def _net(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *modules)


class Conv(nn.Module):
    """No kind of `structure.KINDS`: a model= is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("wide", torch.randn(2, 3).expand(4, 2, 3))


@pytest.mark.parametrize("meta", [True, False])
def test_strides_are_kept(meta: bool, tmp_path: Path) -> None:
    model = Conv().to(memory_format=torch.channels_last)
    save(model, tmp_path / "m")
    with torch.device("meta" if meta else "cpu"):
        skeleton = Conv()
    again = load(tmp_path / "m", model=skeleton)
    assert again.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert again.turned.stride() == (1, 5)
    assert saved.same_state(again, saved.state_of(model))


def test_a_model_in_channels_last_stays_so(tmp_path: Path) -> None:
    model = Conv()
    save(model, tmp_path / "m")
    given = Conv().to(memory_format=torch.channels_last)
    again = load(tmp_path / "m", model=given)
    assert again.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert saved.same_state(again, saved.state_of(model))


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("mean", torch.zeros(3))
        self.other = nn.Linear(1, 1)
        self.other.register_buffer("mean", self.mean)
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.also_empty = self.empty

    def share(self) -> Shares:
        self.register_buffer("head", self.table.detach()[:2])  # shares memory, is no Parameter
        self.turned = nn.Parameter(self.table.detach().t())
        self.twin = nn.Parameter(self.table.detach())
        self.column = nn.Parameter(self.table.detach()[:, 1])
        return self


def test_what_shared_memory_shares_it_again(tmp_path: Path) -> None:
    model = Shares().share()
    save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m")
    assert "turned" not in stored
    assert "column" not in stored
    again = load(tmp_path / "m", model=Shares().share())
    assert saved.same_state(again, saved.state_of(model))
    assert again.other.mean is again.mean
    assert again.also_empty is again.empty
    assert again.twin is not again.table
    with torch.no_grad():
        again.table.fill_(7)
    for part in (again.head, again.turned, again.twin, again.column):
        assert bool((part == 7).all())


def test_halves_of_one_memory_are_stored_one_by_one(tmp_path: Path) -> None:
    both = torch.randn(4, 6)
    model = _net()
    model.register_buffer("upper", both[:2])
    model.register_buffer("lower", both[2:])
    save(model, tmp_path / "m")
    assert read_header(tmp_path / "m").views == {}


class Scaled(nn.Module):
    """Version 3 of its state holds the scale, earlier ones its logarithm."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 3.0))

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        if local.get("version", 1) < 3:
            state[prefix + "scale"] = state[prefix + "scale"].exp()
        super()._load_from_state_dict(state, prefix, local, *rest)


@pytest.mark.parametrize("versions", [True, False], ids=["with versions", "an older file"])
def test_versions_of_the_state_are_kept(versions: bool, tmp_path: Path) -> None:
    model = _net(Scaled(), nn.Sequential(nn.BatchNorm1d(4), Scaled()))
    compress_(model, {"0": Int8()})
    with torch.no_grad():
        model[1].scale.fill_(2)
    save(model, tmp_path / "m")
    assert read_header(tmp_path / "m").versions["2.0"] == {"version": 2}
    if not versions:
        _rewrite(tmp_path / "m", lambda header, tensors: header.pop("versions"))
    again = load(tmp_path / "m", model=_net(Scaled(), nn.Sequential(nn.BatchNorm1d(4), Scaled())))
    assert saved.same_state(again, saved.state_of(model))


def test_a_state_of_an_earlier_version_is_converted(tmp_path: Path) -> None:
    model = _net(Scaled())
    save(model, tmp_path / "m")
    _rewrite(
        tmp_path / "m", lambda header, tensors: header["versions"].update({"1": {"version": 1}})
    )
    again = load(tmp_path / "m", model=_net(Scaled()))
    assert torch.equal(again[1].scale, model[1].scale.exp())


# --- what cannot be stored ------------------------------------------------------------------


def _buffer(value: Any, name: str = "extra") -> nn.Module:
    model = _net()
    model.register_buffer(name, value)
    return model


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def _overlapping() -> nn.Module:
    whole, model = torch.randn(10), _net()
    model.register_buffer("first", whole[:6])
    model.register_buffer("extra", whole[4:])
    return model


UNSTORABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex128": (lambda: _buffer(torch.ones(3, dtype=torch.complex128)), "extra: .*complex128"),
    "quantised": (
        lambda: _buffer(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
        "extra: expected a dtype .* got torch.qint8",
    ),
    "a name of safetensors": (
        lambda: _buffer(torch.ones(2), "__metadata__"), "__metadata__: expected another name",
    ),
    "no UTF-8": (lambda: _buffer(torch.ones(2), "\ud800"), "a name that UTF-8 can hold"),
    "sparse": (lambda: _buffer(torch.eye(3).to_sparse()), "extra: .*sparse_coo"),
    "csr": (lambda: _buffer(torch.eye(3).to_sparse_csr()), "extra: .*sparse_csr"),
    "nested": (
        lambda: _buffer(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        "extra: expected a plain dense tensor; got a nested one",
    ),
    "jagged": (
        lambda: _buffer(
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
        ),
        "extra: expected a plain dense tensor; got a nested one",
    ),
    "meta": (lambda: _buffer(torch.ones(3, device="meta")), "extra: .*one on meta"),
    "lazy": (lambda: _net(nn.LazyLinear(3)), "1.weight: .*uninitialised"),
    "extra state": (lambda: _net(Extra(2, 2)), "1._extra_state: expected a tensor .*got dict"),
    "a part of memory": (_overlapping, "(extra|first): expected memory of its own"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNSTORABLE)
def test_what_has_no_place_is_named_before_a_byte_is_written(case: str, tmp_path: Path) -> None:
    make, message = UNSTORABLE[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "dtype",
    [torch.complex64, torch.uint16, torch.uint64, torch.int16, torch.bool,
     torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz],
    ids=str,
)  # fmt: skip
def test_a_dtype_comes_back_or_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.randint(0, 2, (3, 16), dtype=torch.uint8).view(dtype)
    model = _buffer(value)
    try:
        save(model, tmp_path / "m")
    except ValueError as error:
        assert str(dtype) in str(error)  # noqa: PT017  # by the version of safetensors
        return
    again = load(tmp_path / "m", model=_buffer(torch.zeros_like(value)))
    assert saved.same_state(again, saved.state_of(model))


def test_the_negative_view_of_a_complex_number_is_stored_by_its_value(tmp_path: Path) -> None:
    value = torch.randn(3, dtype=torch.complex64).conj().imag
    assert value.is_neg()
    save(_buffer(value), tmp_path / "m")
    again = load(tmp_path / "m", model=_buffer(torch.zeros(3)))
    assert torch.equal(again.extra, value)


# --- damage ---------------------------------------------------------------------------------


def _rewrite(path: Path, change: Callable[[Any, dict[str, Tensor]], object]) -> None:
    """Change header or tensors of a file, with right checksums."""
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["bigops"])
    change(header, tensors)
    file_format.write(path, tensors, header, None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 4))
    compress_(model, {"0": Int8()})
    save(model, tmp_path / "m")
    return tmp_path / "m"


def _refused(path: Path, message: str, given: nn.Module | None = None) -> None:
    given = (
        nn.Sequential(nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 4)) if given is None else given
    )
    before = [*((n, id(m)) for n, m in given.named_modules()),
              *((n, id(t), t._version) for n, t in given.named_parameters())]  # fmt: skip
    for model in (None, given):
        with pytest.raises(FormatError, match=message) as caught:
            load(path, model=model)
        assert str(path) in str(caught.value)
    assert before == [*((n, id(m)) for n, m in given.named_modules()),
                      *((n, id(t), t._version) for n, t in given.named_parameters())]  # fmt: skip


def test_a_flipped_bit_anywhere_in_the_tensors_is_refused(path: Path) -> None:
    data = path.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little")
    for at in range(first, len(data), 37):
        raw = bytearray(data)
        raw[at] ^= 1 << at % 8
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=r"CRC-32 .* the file is damaged"):
            load(path)


def test_a_changed_header_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for old, new in (
        (b"ReLU", b"SiLU"),
        (b'"I8"', b'"U8"'),
        (b"bigops.crc32", b"bigops.crc33"),
        (b'"0.values":{', b'"0.valuez":{'),
    ):
        assert old in data
        path.write_bytes(data.replace(old, new))
        with pytest.raises(FormatError, match=r"CRC-32|checksum|damaged|entry|entries"):
            load(path)


HEADERS: dict[str, tuple[Callable[[Any], object], str]] = {
    "fixed of lists": (lambda h: h.update(fixed=[["0.bias"]]), "'fixed' .* a list of names"),
    "fixed of no parameter": (lambda h: h.update(fixed=["9.bias"]), "fixed: .*got '9.bias'"),
    "tied to a list": (lambda h: h.update(tied={"0.bias": ["x"]}), "'tied' .* names by name"),
    "tied to itself": (lambda h: h.update(tied={"x": "x"}), "tied tensor refers to 'x'"),
    "a tie over a tensor": (lambda h: h.update(tied={"0.bias": "2.bias"}), "tied tensor refers"),
    "strides of a text": (lambda h: h.update(strides={"2.weight": "1"}), "'strides' .* lists"),
    "strides that overlap": (
        lambda h: h.update(strides={"2.weight": [1, 1]}), "strides: expected an order",
    ),
    "strides of nothing": (lambda h: h.update(strides={"x": [1]}), "strides: .*'x'"),
    "a view past the end": (
        lambda h: h.update(views={"x": ["2.bias", 3, [2], [1]]}), "views: expected 'x' to lie",
    ),
    "a view of nothing": (lambda h: h.update(views={"x": ["y", 0, [1], [1]]}), "of 'y'"),
    "a view that is none": (lambda h: h.update(views={"x": ["2.bias", 0]}), "'views' .* parts"),
    "versions of a list": (lambda h: h.update(versions={"": [1]}), "'versions' .* dicts"),
    "training of 1": (lambda h: h.update(training=1), "'training' .* a bool"),
    "a version that is true": (lambda h: h.update(format=True), "expected format version 2"),
    "an index outside": (
        lambda h: h["tree"]["children"].update(
            {"1": {"kind": "Embedding", "args": {
                "num_embeddings": 5, "embedding_dim": 4, "padding_idx": 7, "max_norm": None,
                "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}}}),
        "Embedding",
    ),
    "a flag in words": (
        lambda h: h["tree"]["children"]["1"]["args"].update(inplace="no"),
        "inplace: expected one of True, False; got 'no'",
    ),
    "a device": (
        lambda h: h["tree"]["children"]["0"]["args"].update(device="cpu"),
        "expected the arguments .* got 'device'",
    ),
    "a size that is true": (
        lambda h: h["tree"]["children"]["0"]["args"].update(in_features=True),
        "in_features: expected a whole number from 0; got 'True'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_checked_in_depth(case: str, path: Path) -> None:
    change, message = HEADERS[case]
    _rewrite(path, lambda header, tensors: change(header))
    _refused(path, message)


def test_every_kind_says_what_its_arguments_may_be(tmp_path: Path) -> None:
    for model in (saved.every_kind(), saved.every_format(), saved.every_format(False)):
        nodes = [structure.describe(model)]
        for node in nodes:
            nodes += node.get("children", {}).values()
            fields = structure.KINDS[node["kind"]].fields
            assert arguments.misfit(fields, json.loads(json.dumps(node["args"]))) is None
            for name in node["args"]:
                wrong = arguments.misfit(fields, {**node["args"], name: {"x": 1}})
                assert wrong is not None
                assert wrong.startswith(f"{name}: expected ")


def test_a_module_of_the_callers_that_refuses_leaves_all_as_it_was(tmp_path: Path) -> None:
    class Refuses(Scaled):
        def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
            self.seen = self.register_buffer("late", torch.ones(1))
            raise KeyError("version")

    model = _net(Scaled())
    compress_(model, {"0": Int8()})
    save(model, tmp_path / "m")
    given = _net(Refuses())
    _ = [dict(vars(m)) for m in given.modules()]
    with pytest.raises(FormatError, match="KeyError: 'version'"):
        load(tmp_path / "m", model=given)
    assert type(given[0]) is nn.Linear
    assert not hasattr(given[1], "late")
    assert not hasattr(given[1], "seen")
    assert "late" not in given.state_dict()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_load_leaves_the_model(error, path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    given = nn.Sequential(nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 4))
    before = [(n, id(m)) for n, m in given.named_modules()], saved.state_of(given)

    def stop(*args: object) -> None:
        raise error

    monkeypatch.setattr("bigops.compress.store._tie", stop)
    with pytest.raises(error):
        load(path, model=given)
    assert [(n, id(m)) for n, m in given.named_modules()] == before[0]
    assert saved.same_state(given, before[1])


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    with pytest.raises(FormatError, match="it is a device or FIFO"):
        load(tmp_path / "m")


# --- random numbers and memory --------------------------------------------------------------


def test_loading_draws_no_random_number_nor_rewinds_any(tmp_path: Path) -> None:
    for i, model in enumerate(
        (saved.every_kind(), saved.every_format(), saved.every_format(False))
    ):
        save(model, tmp_path / str(i))
    state = torch.get_rng_state()
    for i in range(3):
        load(tmp_path / str(i))
        load_compressed(tmp_path / str(i))
    assert torch.equal(torch.get_rng_state(), state)
    seen: list[float] = []
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            seen.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=draw)
    thread.start()
    for _ in range(3):
        load(tmp_path / "1")
    stop.set()
    thread.join()
    assert len(set(seen)) == len(seen) > 100


PEAK = """
import gc, os, sys, torch, bigops
def status(key):
    return [int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key)][0]
small, *files = sys.argv[1:]
bigops.load(small)
for file in files:
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    model = bigops.load(file)
    print((status("VmHWM") - before) / os.path.getsize(file))
    del model
"""


@pytest.mark.parametrize(
    "formats",
    [["w4a8", "sparse int8"], pytest.param(list(saved.FORMATS), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_the_peak_of_loading_is_at_most_four_times_the_file(
    formats: list[str], tmp_path: Path
) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell the peak of a process anew")
    save(saved.every_format(), tmp_path / "small")
    for name in formats:
        layer: nn.Module = LowRankLinear(3072, 3072, 700)
        if name == "low rank int8":
            layer = QuantLowRankLinear.from_low_rank(layer).freeze()
        elif name != "low rank":
            layer = saved.compressed(name, k=3072, n=1536)
        save(nn.Sequential(layer), tmp_path / name)
    command = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path / "small")]
    command += [str(tmp_path / name) for name in formats]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peaks = dict(zip(formats, map(float, done.stdout.split()), strict=True))
    assert all(peak <= 4 for peak in peaks.values()), peaks
    assert max(peaks.values()) > 0.9  # it measures something


def test_foreign_entries_beside_ours_are_no_harm(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={"format": "pt", "bigops": metadata["bigops"].replace(
        '"checksums": true', '"checksums": false')})  # fmt: skip
    assert load(path)[0].out_features == 10


def test_kinds_that_are_shared_keep_their_stacked_parameters(tmp_path: Path) -> None:
    block = GatedMLP(4, 6, bias=True)
    model = nn.Sequential(block, Linear(4, 4), block)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert saved.same_state(again, saved.state_of(model))
