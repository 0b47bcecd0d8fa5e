"""Damage of saved files is refused and changes nothing; loading takes no number and no memory."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bigops import FormatError, Int8, compress_, load, save
from bigops.compress import structure
from bigops.compress.store import load_compressed
from bigops.nn import LowRankLinear, PackedGatedMLP, PackedLowRankLinear, QuantLowRankLinear
from bigops.nn.fields import misfit
from tests.compress.test_saved_files import Scaled, net
from tests.support import saved_models as saved
from tests.support.saved_models import rewrite


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
    before = [
        *((n, id(m)) for n, m in given.named_modules()),
        *((n, id(t), t._version) for n, t in given.named_parameters()),
    ]
    for model in (None, given):
        with pytest.raises(FormatError, match=message) as caught:
            load(path, model=model)
        assert str(path) in str(caught.value)
    assert before == [
        *((n, id(m)) for n, m in given.named_modules()),
        *((n, id(t), t._version) for n, t in given.named_parameters()),
    ]


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
        (b'"0.values": {', b'"0.valuez": {'),
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
        lambda h: h.update(strides={"2.weight": [1, 1]}),
        "strides: expected an order",
    ),
    "strides of nothing": (lambda h: h.update(strides={"x": [1]}), "strides: .*'x'"),
    "a view past the end": (
        lambda h: h.update(views={"x": ["2.bias", 3, [2], [1]]}),
        "views: expected 'x' to lie",
    ),
    "a view of nothing": (lambda h: h.update(views={"x": ["y", 0, [1], [1]]}), "of 'y'"),
    "a view that is none": (lambda h: h.update(views={"x": ["2.bias", 0]}), "'views' .* parts"),
    "versions of a list": (lambda h: h.update(versions={"": [1]}), "'versions' .* dicts"),
    "training of 1": (lambda h: h.update(training=1), "'training' .* a bool"),
    "a version that is true": (lambda h: h.update(format=True), "expected format version 2"),
    "an index outside": (
        lambda h: h["tree"]["children"].update(
            {
                "1": {
                    "kind": "Embedding",
                    "args": {
                        "num_embeddings": 5,
                        "embedding_dim": 4,
                        "padding_idx": 7,
                        "max_norm": None,
                        "norm_type": 2.0,
                        "scale_grad_by_freq": False,
                        "sparse": False,
                    },
                }
            }
        ),
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
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_checked_in_depth(case: str, path: Path) -> None:
    change, message = HEADERS[case]
    rewrite(path, lambda header, tensors: change(header))
    _refused(path, message)


def test_every_kind_says_what_its_arguments_may_be(tmp_path: Path) -> None:
    for model in (saved.every_kind(), saved.every_format(), saved.every_format(False)):
        nodes = [structure.describe(model)]
        for node in nodes:
            nodes += node.get("children", {}).values()
            fields = structure.KINDS[node["kind"]].fields
            assert misfit(fields, json.loads(json.dumps(node["args"]))) is None
            for name in {*node["args"]} - {"form"}:  # of which the format itself says more
                wrong = misfit(fields, {**node["args"], name: {"x": 1}})
                assert wrong is not None
                assert wrong.startswith(f"{name}: expected ")


def test_a_module_of_the_callers_that_refuses_leaves_all_as_it_was(tmp_path: Path) -> None:
    class Refuses(Scaled):
        def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
            self.seen = self.register_buffer("late", torch.ones(1))
            raise KeyError("version")

    model = net(Scaled())
    compress_(model, {"0": Int8()})
    save(model, tmp_path / "m")
    given = net(Refuses())
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
    [["w4a8", "packed gated"], pytest.param(list(saved.FORMATS), marks=pytest.mark.slow)],
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
        elif name == "packed low rank":
            layer = PackedLowRankLinear.from_low_rank(layer).freeze()
        elif name == "packed gated":
            layer = PackedGatedMLP(3072, 1536)
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
    save_file(
        load_file(path),
        path,
        metadata={
            "format": "pt",
            "bigops": metadata["bigops"].replace('"checksums": true', '"checksums": false'),
        },
    )
    assert load(path)[0].out_features == 10
