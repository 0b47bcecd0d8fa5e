"""What a saved file keeps, what it refuses to hold, and how damage is met."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from bigops import Int8, compress_, load, save
from bigops.compress import structure
from bigops.compress.store import load_compressed, read_header
from bigops.nn import GatedMLP, Linear
from bigops.nn.stored_parameter import StoredParameter
from tests.support import saved_models as saved
from tests.support.saved_models import rewrite

GOLDEN = Path(__file__).parents[1] / "golden" / "saved"


# --- files of earlier versions --------------------------------------------------------------


@pytest.mark.parametrize("name", ["kinds", "frozen", "trainable", "states", "packed"])
def test_files_of_earlier_versions_load_bit_for_bit(name: str) -> None:
    """All but the last are from before there were checksums."""
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) - {"bigops"} == (
            {"bigops.crc32"} if name == "packed" else set()
        )
        header = json.loads(file.metadata()["bigops"])
    model = load(path)
    state = model.state_dict()
    # What a layer of an older version had, and the layers of today read past.
    retired = {n for n in tensors if n.endswith(".y_grid")}
    tensors = {n.replace("x_grid", "x_qparams"): t for n, t in tensors.items() if n not in retired}
    assert set(state) == set(tensors) | set(header["tied"])
    assert all(
        torch.equal(state[n].view(torch.uint8), t.view(torch.uint8))
        for n, t in tensors.items()
        if t.numel() and t.dim()
    )
    if not retired:
        assert structure.describe(model) == header["tree"]
    fixed = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    of_layers = {n for n, p in fixed.items() if isinstance(p, StoredParameter)}
    assert fixed.keys() - of_layers == set(header["fixed"])
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
        *saved.KINDS,
        "Sequential",
        "ModuleList",
        "ModuleDict",
        "bigops.Deployed",  # of tests/graph/deploy
        "bigops.QuantLinear",
        "bigops.Fp8Linear",
        "bigops.SparseLinear",
        "bigops.QuantLowRankLinear",
        "bigops.LowRankLinear",
        "bigops.PackedLinear",
        "bigops.PackedGatedMLP",
        "bigops.PackedLowRankLinear",
        "bigops.CompressedLinear",
    } - {"GatedMLP compressed", "MultiheadAttention compressed"}


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


def net(*modules: nn.Module) -> nn.Sequential:
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
    model = net()
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
    model = net(Scaled(), nn.Sequential(nn.BatchNorm1d(4), Scaled()))
    compress_(model, {"0": Int8()})
    with torch.no_grad():
        model[1].scale.fill_(2)
    save(model, tmp_path / "m")
    assert read_header(tmp_path / "m").versions["2.0"] == {"version": 2}
    if not versions:
        rewrite(tmp_path / "m", lambda header, tensors: header.pop("versions"))
    again = load(tmp_path / "m", model=net(Scaled(), nn.Sequential(nn.BatchNorm1d(4), Scaled())))
    assert saved.same_state(again, saved.state_of(model))


def test_a_state_of_an_earlier_version_is_converted(tmp_path: Path) -> None:
    model = net(Scaled())
    save(model, tmp_path / "m")
    rewrite(
        tmp_path / "m", lambda header, tensors: header["versions"].update({"1": {"version": 1}})
    )
    again = load(tmp_path / "m", model=net(Scaled()))
    assert torch.equal(again[1].scale, model[1].scale.exp())


# --- what cannot be stored ------------------------------------------------------------------


def _buffer(value: Any, name: str = "extra") -> nn.Module:
    model = net()
    model.register_buffer(name, value)
    return model


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def _overlapping() -> nn.Module:
    whole, model = torch.randn(10), net()
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
        lambda: _buffer(torch.ones(2), "__metadata__"),
        "__metadata__: expected another name",
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
    "lazy": (lambda: net(nn.LazyLinear(3)), "1.weight: .*uninitialised"),
    "extra state": (lambda: net(Extra(2, 2)), "1._extra_state: expected a tensor .*got dict"),
    "a part of memory": (_overlapping, "(extra|first): expected memory of its own"),
}


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
    [
        torch.complex64,
        torch.uint16,
        torch.uint64,
        torch.int16,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    ],
    ids=str,
)
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


def test_kinds_that_are_shared_keep_their_stacked_parameters(tmp_path: Path) -> None:
    block = GatedMLP(4, 6, bias=True)
    model = nn.Sequential(block, Linear(4, 4), block)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert saved.same_state(again, saved.state_of(model))
