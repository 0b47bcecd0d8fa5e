"""The receipt: what it measures, how it judges, its forms."""

import builtins
import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bigops
from bigops import Floors, Int8, Receipt, Sparse, compress_, save
from bigops.compress import measure
from bigops.compress.receipt import Candidate, FloorBreached, Layer, Side
from bigops.compress.store import read_header
from bigops.graph import plain
from bigops.nn import GatedMLP, Linear, QuantLinear
from bigops.timing import Ratio


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Timing tiny layers on a busy machine: two spinning threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = nn.Sequential(Linear(64, 128, activation="relu"), Linear(128, 10)).eval()
    small = copy.deepcopy(dense)
    compress_(small, {"0": Sparse(0.8) + Int8(), "1": Int8()})
    return plain(dense), small


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Receipt:
    before, after = _pair()
    folder = tmp_path_factory.mktemp("files")
    save(before, folder / "a")
    save(after, folder / "b")
    x = torch.randn(32, 64)
    return Receipt.measure(
        before,
        after,
        x,
        accuracy=lambda m: 90.0 + isinstance(m[0], nn.Linear),
        files=(folder / "a", folder / "b"),
        with_compile=False,
        pairs=5,
        floors=Floors(max_drop=1.0),
        candidates=[Candidate("a", 5.0, 80.0)],
        notes=["a note"],
    )


def _made(**changes: object) -> Receipt:
    """A receipt with round numbers."""
    receipt = Receipt(
        before=Side("eager", 400.0, 0.1, 8000, 9000, 8200, 98.5),
        after=Side("bigops", 100.0, 0.1, 1000, 1500, 1100, 98.2),
        speedup=Ratio(4.0, 3.5, 4.5),
        compiled=Side("torch.compile", 200.0, 0.1, 8000, None, 8200, 98.5),
        speedup_compile=Ratio(2.0, 1.8, 2.2),
        layers=[
            Layer("0", "SparseLinear", [128, 64], 0.2, 8000, 1000, 50.0, 10.0, "cpu.x"),
            Layer("1", "QuantLinear", [10, 128], 1.0, 800, 200, None, None, "not called"),
        ],
        candidates=[Candidate("80%", 100.0, 98.0, True), Candidate("int8", 150.0)],
        floors=Floors(3.0, 0.5, 6.0, True),
        machine={"threads": 2, "input": "[32, 64]"},
        notes=["a note"],
    )
    return dataclasses.replace(receipt, **changes)  # type: ignore[arg-type]


# --- measuring -----------------------------------------------------------------------------


def test_measure_fills_everything(measured: Receipt) -> None:
    before, after = _pair()
    assert measured.before.bytes_memory == sum(p.nbytes for p in before.parameters())
    layers = [after[0], after[1]]
    assert measured.after.bytes_memory == sum(layer.nbytes for layer in layers)
    assert measured.before.bytes_disk > measured.after.bytes_disk > measured.after.bytes_memory
    assert measured.before.latency_us > 0
    assert measured.speedup.low <= measured.speedup.value <= measured.speedup.high
    assert [row.name for row in measured.layers] == ["0", "1"]
    assert [row.kind for row in measured.layers] == ["SparseLinear", "QuantLinear"]
    assert measured.layers[0].density == pytest.approx(0.2, abs=0.01)
    assert measured.layers[0].shape == [128, 64]
    assert "sparse_linear" in measured.layers[0].kernel
    assert "quantized_linear" in measured.layers[1].kernel
    assert all(row.us_before > 0 and row.us_after > 0 for row in measured.layers)
    assert measured.machine["input"] == "[32, 64]"
    assert measured.machine["pairs"] == 5  # one turn: no floor on latency was set
    json.dumps(measured.machine)
    assert bigops.Receipt is Receipt


def test_measure_leaves_the_models_alone() -> None:
    before, after = _pair()
    before.train()
    after[1].eval()
    flags = [m.training for m in [*before.modules(), *after.modules()]]
    Receipt.measure(before, after, torch.randn(4, 64), with_compile=False, pairs=2)
    assert [m.training for m in [*before.modules(), *after.modules()]] == flags
    assert not any(m._forward_pre_hooks for m in after.modules())


def test_compile_is_measured_or_the_reason_noted(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    before, after = _pair()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: real(m, backend="eager"))
    receipt = Receipt.measure(before, after, torch.randn(4, 64), pairs=2)
    assert receipt.compiled is not None
    assert receipt.speedup_compile is not None

    def fail(module: nn.Module) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", fail)
    receipt = Receipt.measure(
        before, after, torch.randn(4, 64), pairs=2, floors=Floors(beat_compile=True)
    )
    assert receipt.compiled is None
    assert "no compiler here" in receipt.notes[0]
    assert "torch.compile was to be beaten, but was not measured" in receipt.breaches()[0]


def test_more_rounds_are_taken_while_noise_hides_the_floor(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """All rounds count, whichever way they point: nothing is measured until it fits."""
    before, after = _pair()
    turns: list[int] = []

    def interleave(sides: dict, pairs: int, **kwargs: object) -> dict:
        turns.append(pairs)
        wide = np.array([1.0, 5.0] * (pairs // 2))
        return {n: wide if n == "eager" else np.ones(pairs) for n in sides}

    monkeypatch.setattr("bigops.timing.interleave", interleave)
    monkeypatch.setattr(measure, "layers", lambda *args: [])
    x = torch.randn(4, 64)
    for floor, expected in ((3.0, 5), (0.5, 1), (9.0, 1), (None, 1)):
        turns.clear()
        receipt = Receipt.measure(
            before, after, x, with_compile=False, pairs=6, floors=Floors(min_speedup=floor)
        )
        assert len(turns) == expected
        assert receipt.machine["pairs"] == 6 * expected
    assert measure.clear(Ratio(2, 1, 3), 1.0)
    assert not measure.clear(Ratio(2, 1, 3), 2.5)
    assert measure.clear(Ratio(2, 1, 3), 3.5)


def test_peak_counts_what_lives_at_once() -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                x = x + 1  # two of these live at once, not five
            return x

    class Keeps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x + i for i in range(4)]).sum(0)

    x = torch.randn(256, 256)
    one = x.nbytes
    assert measure.peak_bytes(Chain(), x) == 2 * one
    assert measure.peak_bytes(Keeps(), x) == 8 * one


def test_bytes_count_storages_once() -> None:
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert measure.model_bytes(tied) == 8 * 8 * 4
    layer = QuantLinear(8, 8, bias=False).eval()
    assert measure.model_bytes(layer) == 8 * 8 * 4
    with torch.no_grad():
        layer(torch.randn(2, 8))
    assert measure.model_bytes(layer) == layer.nbytes == 8 * 8 * 4  # nothing is kept of a call
    assert measure.model_bytes(layer.freeze()) == layer.nbytes == 16 * 8 + 16 * 8


def test_layers_that_are_not_called_and_gated_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.idle = GatedMLP(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x)

    model = Net()
    rows = {
        row["name"]: row
        for row in measure.layers(model, copy.deepcopy(model), torch.randn(2, 8), pairs=1)
    }
    assert set(rows) == {"mlp", "idle"}
    assert rows["idle"]["kernel"] == "not called"


# --- judging -------------------------------------------------------------------------------


def test_floors_that_hold() -> None:
    receipt = _made()
    assert receipt.breaches() == []
    assert receipt.check() is receipt
    assert receipt.drop == pytest.approx(0.3)
    assert receipt.size_ratio == pytest.approx(8200 / 1100)
    assert "every floor holds" in str(receipt)


BREACHES = [
    ({"speedup": Ratio(2.9, 2.0, 3.5)}, "at least 3x over eager was asked for; measured 2.90x"),
    ({"speedup": Ratio(float("nan"), 0, 0)}, "at least 3x over eager"),
    ({"speedup_compile": Ratio(0.99, 0.9, 1.2)}, "not slower than torch.compile"),
    ({"speedup_compile": None, "compiled": None}, "torch.compile was to be beaten, but was not"),
    ({"after": Side("bigops", 1.0, 0.1, 1000, None, 1100, 97.9)}, "measured 0.60 .98.50% to"),
    ({"after": Side("bigops", 1.0, 0.1, 1000, None, 1100, float("nan"))}, "a drop of at most"),
    ({"after": Side("bigops", 1.0, 0.1, 1000, None, 1100, None)}, "accuracy not measured"),
    ({"after": Side("bigops", 1.0, 0.1, 1000, None, 2000, 98.2)}, "6x smaller.*measured 4.10x"),
]


@pytest.mark.parametrize(("change", "message"), BREACHES)
def test_each_floor_fails_loudly(change: dict, message: str) -> None:
    receipt = _made(**change)
    assert len(receipt.breaches()) == 1
    with pytest.raises(FloorBreached, match=message):
        receipt.check()
    assert "BREACHED" in str(receipt)


def test_no_floor_no_breach() -> None:
    assert _made(floors=Floors(), speedup=Ratio(0.1, 0.1, 0.1)).breaches() == []


# --- forms ---------------------------------------------------------------------------------


def test_json_round_trip(measured: Receipt) -> None:
    for receipt in (measured, _made(), _made(compiled=None, speedup_compile=None)):
        assert Receipt.from_json(receipt.to_json()) == receipt
    assert json.loads(_made(speedup=Ratio(1, 1, 1)).to_json())["breaches"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"receipt": 99, "breaches": []}', "[" * 100_000])
def test_json_that_is_no_receipt(text: str) -> None:
    with pytest.raises(ValueError, match=r"receipt: expected JSON as Receipt.to_json writes it"):
        Receipt.from_json(text)


def test_table_has_every_number_and_fits_80_columns() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(_made().table())
    text = console.export_text()
    for part in (
        "98.50%",
        "98.20%",
        "-0.30 points",
        "400 us",
        "100 us",
        "4.00x [3.50, 4.50]",
        "2.00x [1.80, 2.20]",
        "8.00 kB",
        "1.10 kB",
        "7.45x",
        "SparseLinear by cpu.x",
        "128 x 64",
        "0.20",
        "50 -> 10",
        "a note",
    ):
        assert part in text, part
    same = _made(after=Side("bigops", 100.0, 0.1, 1000, 1500, 1100, 98.5))
    assert "+0.00 points" in str(same)  # no minus where nothing is lost


def test_png(measured: Receipt, tmp_path: Path) -> None:
    for receipt in (measured, _made(), _made(layers=[], candidates=[], compiled=None)):
        receipt.to_png(tmp_path / "r.png")
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [p.name for p in tmp_path.iterdir()] == ["r.png"]


def test_png_without_matplotlib_says_what_installs_it(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bigops\[plot\]'"):
        _made().to_png(tmp_path / "r.png")
    assert list(tmp_path.iterdir()) == []


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    _made().save_json(tmp_path / "r.json")
    assert Receipt.from_json((tmp_path / "r.json").read_text()) == _made()
    monkeypatch.setattr(Receipt, "to_json", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _made().save_json(tmp_path / "other.json")
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_the_receipt_travels_with_the_model(tmp_path: Path) -> None:
    _, model = _pair()
    save(model, tmp_path / "m", receipt=_made())
    assert Receipt.from_json(read_header(tmp_path / "m").receipt) == _made()
