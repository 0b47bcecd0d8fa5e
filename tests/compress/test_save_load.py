"""bigops.save and bigops.load: one file, no pickle, nothing half-written, nothing half-loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bigops
from bigops import W4A8, Int4, Int8, Sparse, compress_, freeze_, load, save
from bigops.compress import structure
from bigops.compress.build import Choice, build
from bigops.compress.store import load_compressed
from bigops.files import FormatError
from bigops.nn import GatedMLP, Linear, LowRankLinear, QuantLinear, SparseLinear
from tests.support.saved_models import rewrite_as_older


def _model() -> nn.Sequential:
    model = nn.Sequential(
        nn.Flatten(),
        Linear(64, 32, activation="gelu"),
        nn.Linear(32, 24),
        nn.ReLU(),
        nn.LayerNorm(24),
        nn.Dropout(0.5),
        GatedMLP(24, 16),
        nn.Linear(24, 10),
    )
    # too small for their pattern to pay: compress_ would leave them or drop it
    compress_(model, {"1": Sparse(0.75) + Int8(), "2": Int8(), "7": Sparse(0.5)}, freeze=False)
    freeze_(model)
    return model.eval()


class Net(nn.Module):
    """A class that the file cannot build."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.ModuleList([nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.block:
            x = layer(x)
        return self.head(x)


def _snapshot(model: nn.Module) -> list:
    return [
        *((name, id(m), m.training) for name, m in model.named_modules()),
        *((n, id(p), p._version, p.requires_grad) for n, p in model.named_parameters()),
        *((n, id(b), b._version) for n, b in model.named_buffers()),
    ]


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    model, x = _model(), torch.randn(5, 8, 8)
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert torch.equal(again(x), model(x))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert not again.training
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        Int4(),
        W4A8,
        Int8(symmetric=False),
        Int8(activations="static"),
        Int8(activations="none", group=32, symmetric=False),
    ],
    ids=str,
)
def test_every_quantised_form_round_trips(
    config: Int8 | Int4, freeze: bool, tmp_path: Path
) -> None:
    model, x = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 7)).eval(), torch.randn(5, 40)
    for i in (0, 1):
        qparams = (0.02, 128.0) if config.activations == "static" else None
        model[i] = build(model[i], Choice(config, qparams))
        if freeze:
            model[i].freeze()
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert [m.arguments() for m in again] == [m.arguments() for m in model]


@pytest.mark.parametrize("state", ["recovery", "frozen", "thawed"])
@pytest.mark.parametrize(
    "config",
    [
        Sparse(0.7, "1x1"),
        Sparse(0.7, "4x1", "bf16"),
        Sparse(0.7, "16x16"),
        Sparse(pattern="2:4"),
        Sparse(0.7, "16x1") + Int8(),
    ],
    ids=str,
)
def test_every_sparse_form_round_trips(config: Sparse, state: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 7)), torch.randn(5, 40)
    compress_(model, config, freeze=False)
    if state != "recovery":
        freeze_(model)
    if state == "thawed" and isinstance(config, Sparse):
        for layer in model:
            layer.thaw()
    save(model, tmp_path / "m.safetensors")
    for again in (
        load(tmp_path / "m.safetensors"),
        load(tmp_path / "m.safetensors", model=nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 7))),
    ):
        assert torch.equal(again(x), model(x))
        assert [m.arguments() for m in again] == [m.arguments() for m in model]
        names = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in again.named_parameters()] == names
        again(x).sum().backward()
        assert all(p.grad is not None for p in again.parameters() if p.requires_grad)


def test_compressed_layers_load_without_the_model(tmp_path: Path) -> None:
    model = Net()
    compress_(model, {"block.0": Sparse(0.5, "4x1"), "block.2": Int8()})
    save(model, tmp_path / "m.safetensors")
    found = load_compressed(tmp_path / "m.safetensors")
    assert list(found) == ["block.0", "block.2"]
    assert torch.equal(found["block.0"].dense_weight(), model.block[0].dense_weight())
    save(model.block[0], tmp_path / "alone.safetensors")
    assert list(load_compressed(tmp_path / "alone.safetensors")) == [""]


def test_fresh_process_without_pickle(tmp_path: Path) -> None:
    model, x = _model(), torch.randn(5, 8, 8)
    save(model, tmp_path / "m.safetensors")
    save_file({"x": x}, tmp_path / "x.safetensors")
    code = (
        "import sys, pickle, torch\n"
        "def refuse(*a, **k): raise AssertionError('pickle was used')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = refuse\n"
        "import bigops\n"
        "from safetensors.torch import load_file, save_file\n"
        "folder = sys.argv[1]\n"
        "with torch.inference_mode():\n"
        "    x = load_file(folder + '/x.safetensors')['x']\n"
        "    y = bigops.load(folder + '/m.safetensors')(x)\n"
        "save_file({'y': y.clone()}, folder + '/y.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    with torch.inference_mode():
        expected = model(x)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], expected)


def test_file_holds_packed_bytes_and_readable_structure(tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Linear(512, 512))
    save(linear, tmp_path / "dense")
    compress_(linear, Sparse(0.8) + Int8())
    save(linear, tmp_path / "small")
    assert (tmp_path / "dense").stat().st_size > 10 * (tmp_path / "small").stat().st_size
    with safe_open(tmp_path / "small", "pt") as file:
        header = json.loads(file.metadata()["bigops"])
        assert "0.weight" not in file.keys()  # noqa: SIM118
    assert header["format"] == 2
    node = header["tree"]["children"]["0"]
    assert node["kind"] == "bigops.SparseLinear"
    assert node["args"]["in_features"] == 512


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_skeleton(tmp_path: Path, meta: bool, fused: bool) -> None:
    model = Net().eval()
    if fused:
        model.block[0], model.block[1] = Linear.from_linear(model.block[0], "gelu"), nn.Identity()
    model.block[2].bias.requires_grad_(False)
    compress_(model, {"block.0": Sparse(0.5) + Int8(), "block.2": Int8()}, freeze=False)
    freeze_(model)
    ids = torch.arange(11)
    expected = model(ids)
    save(model, tmp_path / "net")
    with pytest.raises(FormatError, match=r"the model is a '.*Net', which the file cannot build"):
        load(tmp_path / "net")
    with torch.device("meta" if meta else "cpu"):
        skeleton = Net()
    again = load(tmp_path / "net", model=skeleton)
    assert again is skeleton
    assert again.training
    again.eval()
    assert torch.equal(again(ids), expected)
    assert again.head.weight is again.embed.weight
    assert type(again.block[0]) is SparseLinear
    assert type(again.block[2]) is QuantLinear
    assert not again.block[2].bias.requires_grad
    assert int(again.steps) == 3


def test_recovery_layers_go_on_training_after_a_reload(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh())
    compress_(model, Sparse(0.5) + Int8(), freeze=False)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.training
    assert torch.equal(again[0].mask, model[0].mask)
    again(torch.randn(2, 16)).sum().backward()
    assert again[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    model = _model().to(dtype)
    x = torch.randn(3, 8, 8, dtype=dtype)
    save(model, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")(x), model(x))


def test_empty_and_odd_layers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 0), nn.Embedding(3, 2))
    compress_(model, {"0": Sparse(0.99) + Int8()}, freeze=False)
    freeze_(model)
    save(model, tmp_path / "m")
    x = torch.randn(2, 5)
    assert torch.equal(load(tmp_path / "m")[0](x), model[0](x))


# --- files that are refused ----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(_model(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def _refused(path: Path, message: str) -> None:
    """Without a model and with one, which must stay as it was."""
    skeleton = _model()
    before = _snapshot(skeleton)
    for model in (None, skeleton):
        with pytest.raises(FormatError, match=message) as caught:
            load(path, model=model)
        assert path.name in str(caught.value)
    assert _snapshot(skeleton) == before


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated(saved: Path, keep: int) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:keep])
    _refused(saved, "expected a whole safetensors file .* truncated")


def test_foreign(saved: Path, tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(2, 2)}, saved)
    _refused(saved, r"expected a header 'bigops'")
    saved.write_bytes(b"PK\x03\x04" + b"\0" * 100)
    _refused(saved, "expected a whole safetensors file")
    torch.save({}, saved)
    _refused(saved, "expected a whole safetensors file")


def _child(header: dict, name: str) -> dict:
    return header["tree"]["children"][name]


CHANGES = {
    "version": (lambda h, t: h.update(format=99), "expected format version 2; got 99"),
    "an earlier version": (
        lambda h, t: h.update(format=1),
        "expected format version 2; got 1 .written by another version of bigops",
    ),
    "no json": (lambda h, t: "{", "the header is no JSON"),
    "deep json": (lambda h, t: "[" * 100_000, "the header is no JSON"),
    "no version": (lambda h, t: "[]", "expected a header with a format version"),
    "no tree": (lambda h, t: h.pop("tree") and None, "expected 'tree' in the header"),
    "missing tensor": (lambda h, t: t.__delitem__("2.scale"), r"(2\.|module '2'(.|\n)*)scale"),
    "extra tensor": (lambda h, t: t.update(junk=torch.zeros(1)), "junk"),
    "wrong size": (lambda h, t: t.update({"4.weight": torch.zeros(25)}), "4.weight"),
    "unknown kind": (lambda h, t: _child(h, "3").update(kind="os.system"), "got 'os.system'"),
    "bad args": (
        lambda h, t: _child(h, "3").update(args={"x": 1}),
        "cannot be made|the file holds",
    ),
    "huge": (
        lambda h, t: _child(h, "2")["args"].update(in_features=1 << 70),
        "1180591620717411303",
    ),
    "negative": (lambda h, t: _child(h, "2")["args"].update(out_features=-1), "-1"),
    "bad tie": (lambda h, t: h["tied"].update({"a": "b"}), "tied tensor refers to 'b'"),
    "bad pointer": (
        lambda h, t: t["1.ptr"].__setitem__(2, 1 << 20) and None,
        "ptr: expected values that rise",
    ),
    "bad index": (
        lambda h, t: t["1.index"].__setitem__((0, 0), 127) and None,
        "index: expected words below 64; got 127",
    ),
    "bad values": (
        lambda h, t: t["7.values"].__setitem__((0, 0), torch.nan) and None,
        "values: expected finite",
    ),
    "bad padding": (
        lambda h, t: t["7.length"].zero_() is None,
        "values: expected 0 in the padding",
    ),
    "bad sums": (lambda h, t: t["1.sums"].add_(1) is None, "sums: expected the sum of the values"),
    "bad chunk": (lambda h, t: _child(h, "1")["args"].update(chunk=100), "chunk: expected 64, 128"),
    "other chunk": (lambda h, t: _child(h, "1")["args"].update(chunk=128), "rows: expected shape"),
    "bad pattern": (
        lambda h, t: _child(h, "1")["args"].update(pattern="0x4"),
        "pattern: expected HxW",
    ),
    "other values": (
        lambda h, t: _child(h, "7")["args"].update(values="bf16"),
        "values: expected dtype bf16 as the layer has; got torch.float32",
    ),
    "thawed int8": (
        lambda h, t: _child(h, "1")["args"].update(thawed=True),
        "thaw: expected floating values; got int8",
    ),
    "bad dtype": (
        lambda h, t: t.update({"2.values": t["2.values"].float()}),
        "expected dtype int8",
    ),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_changed_files_are_refused(saved: Path, name: str) -> None:
    change, message = CHANGES[name]
    rewrite_as_older(saved, change)
    _refused(saved, message)


def test_an_unchanged_rewrite_is_accepted(saved: Path) -> None:
    rewrite_as_older(saved, lambda h, t: None)
    x = torch.randn(2, 8, 8)
    assert load(saved)(x).shape == (2, 10)
    assert torch.equal(load(saved, model=_model())(x), load(saved)(x))


def test_nesting_is_bounded() -> None:
    node: dict = {"kind": "Identity", "args": {}}
    for _ in range(200):
        node = {"kind": "Sequential", "args": {}, "children": {"0": node}}
    with pytest.raises(structure.StructureError, match="nested deeper than 64"):
        structure.build(node)


def test_models_that_do_not_fit_stay_as_they_were(tmp_path: Path) -> None:
    save(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), tmp_path / "m")
    cases = {
        r"the file has the children \['0', '1'\]; the model \['0'\]": nn.Sequential(
            nn.Linear(4, 3)
        ),
        r"module '0': the file holds torch.Linear with .* the model has": nn.Sequential(
            nn.Linear(4, 2), nn.LayerNorm(3)
        ),
        r"module '1': the file holds a LayerNorm; the model a .*ReLU": nn.Sequential(
            nn.Linear(4, 3), nn.ReLU()
        ),
        r"eps": nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3, eps=1e-3)),
    }
    for message, model in cases.items():
        before = _snapshot(model)
        with pytest.raises(FormatError, match=message):
            load(tmp_path / "m", model=model)
        assert _snapshot(model) == before
    compressed = nn.Sequential(nn.Linear(8, 16))
    compress_(compressed, Int8())
    save(compressed, tmp_path / "c")
    with pytest.raises(FormatError, match=r"in_features 8; the model's has 9"):
        load(tmp_path / "c", model=nn.Sequential(nn.Linear(9, 16)))


def test_meta_buffers_outside_the_state_are_refused(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("table", torch.ones(2), persistent=False)

    save(Rotary(), tmp_path / "m")
    with torch.device("meta"):
        skeleton = Rotary()
    with pytest.raises(FormatError, match=r"buffers \['table'\] are on the meta device"):
        load(tmp_path / "m", model=skeleton)
    assert skeleton.linear.weight.is_meta


def test_hooks_are_not_lost_silently(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda m, a, y: y * 2)
    save(model, tmp_path / "m")
    with pytest.raises(FormatError, match="forward hook"):
        load(tmp_path / "m")


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: expected a file written by"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        load(tmp_path)


# --- writing -------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected an existing folder"):
        save(_model(), tmp_path / "nowhere" / "m")


def test_a_read_only_folder_is_named_and_stays_empty(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "readonly"
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0:  # root writes anywhere: refuse as a read-only mount would
        import tempfile

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match="readonly: cannot write into this folder"):
        save(_model(), folder / "m")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(saved: Path, monkeypatch, error) -> None:  # type: ignore[no-untyped-def]
    before = saved.read_bytes()

    def half(file: BinaryIO, tensor: Tensor) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr("bigops.files.tensors._put", half)
    with pytest.raises(type(error)):
        save(_model(), saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_state_that_has_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight: expected a dense tensor with content.*on meta"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_public_names() -> None:
    assert bigops.save is save
    assert bigops.load is load
    assert bigops.FormatError is FormatError


def test_a_low_rank_layer_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(LowRankLinear(12, 9, 3, activation="gelu"), nn.Linear(9, 4)).eval()
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    x = torch.randn(5, 12)
    assert type(again[0]) is LowRankLinear
    assert torch.equal(again(x), model(x))
