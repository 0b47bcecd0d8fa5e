"""`bigops tune --device cuda` without a GPU: its keys, its file, what is resumed, what serves.

The kernels run in the interpreter and the timer is scripted, so that all but the clock is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import bigops
from bigops import cli, explain
from bigops.backend import gpu_tiles
from bigops.kernels.common import tuned
from bigops.kernels.common.tiles import TileConfig
from bigops.ops import tuned as _triton_tuned
from bigops.tune import tiles as tune_gpu
from bigops.tune.problems import PROBLEMS
from bigops.tune.tiles import Target
from tests.support import triton_interpreter
from tests.support.backends import covering
from tests.support.cases.linear import make
from tests.support.kernels_ran import expect
from tests.tune.gpu_cases import (  # noqa: F401 - fixtures
    KEY,
    MACHINE,
    NAMES,
    SHAPE,
    TARGET,
    TILES,
    Scripted,
    cache,
    fill,
    point,
    run,
    serve,
    stored,
    three_tiles,
)

triton_interpreter.install()
module = sys.modules["bigops.ops.fused_linear"]


# --- keys ----------------------------------------------------------------------------------------


def test_buckets_round_each_size_up_to_a_power_of_two() -> None:
    assert tuned.bucket(1, 16, 17) == "m16-n16-k32"
    assert tuned.bucket(0) == "m16"
    assert tuned.bucket(4096, 4097, 10**9) == "m4096-n8192-k65536"


@pytest.mark.parametrize(("op", "shape"), covering(PROBLEMS, [(20, 64, 64), (5, 72, 128)]), ids=str)
def test_the_kernels_ask_for_the_keys_that_are_measured(
    op: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every problem runs, and its call without a tile looks its own entry up first."""
    asked: list[str] = []

    def lookup(op: str, arch: str, *key: str) -> None:
        asked.append(tuned.key_of(op, *key))

    monkeypatch.setattr(tuned, "lookup", lookup)
    dtypes = ("bf16",) if op == "quantized_linear" else ("f32", "bf16")
    forms = set()
    for step in tune_gpu.steps(TARGET, [op], [shape], dtypes):
        call = step.make()
        asked.clear()
        tuned._forget_answers()
        call(None)
        assert asked[0] == step.key
        found = _triton_tuned.candidates(op, "interpreter", step.form, step.dtype)
        if found:
            call(found[0])
        forms.add(step.form)
    assert len(forms) >= 2


def test_every_shipped_tile_is_a_candidate_of_its_form_and_dtype() -> None:
    for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"):
        for op in tune_gpu.OPS:
            for form, dtypes, tile in _triton_tuned.entries(op, arch):
                for dtype in dtypes:
                    assert tile in _triton_tuned.candidates(op, arch, form, dtype)


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([point(3, 1, 2)], 1),
        ([point(1, 1, 2)], 0),  # of equals the first
        ([point(1, 2, 4), point(4, 1, 2)], 1),  # log costs 2, 1, 3
        ([point(None, 5, 1), point(1, 9, None)], 1),  # the only one that ran everywhere
    ],
)
def test_the_tile_of_least_mean_cost_over_shapes(points: list[dict[str, Any]], best: int) -> None:
    chosen = tune_gpu.choose({str(i): p for i, p in enumerate(points)})
    assert chosen == TILES[best]._asdict()


def test_no_tile_is_chosen_where_none_ran() -> None:
    assert tune_gpu.choose({}) is None
    assert tune_gpu.choose({"a": point(None, None, None)}) is None
    assert tune_gpu.choose({"a": point(1, None, None), "b": point(None, 1, 1)}) is None


@pytest.mark.usefixtures("three_tiles")
def test_a_tile_that_does_not_run_is_recorded_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigops.kernels import fused_linear as kernels

    forward = kernels.forward

    def refuses(*args: Any) -> object:
        if args[-1] == TILES[0]:
            raise RuntimeError("out of resource: shared memory, Required: 294912")
        return forward(*args)

    monkeypatch.setattr(kernels, "forward", refuses)
    lines = run(Scripted(0.1, 2, 1))
    measured = stored()["points"][KEY]["20x48x32"]
    assert list(measured["failed"]) == [NAMES[0]]
    assert "RuntimeError: out of resource" in measured["failed"][NAMES[0]]
    assert stored()["tiles"][KEY] == TILES[2]._asdict()
    assert "1 of 3 tiles do not run" in lines[0]
    monkeypatch.setattr(kernels, "forward", lambda *_: 1 / 0)
    assert "3 of 3 tiles do not run" in run(Scripted(), again=True)[0]
    assert KEY not in stored()["tiles"]


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three_tiles")
def test_a_run_that_was_killed_goes_on_where_it_stopped() -> None:
    shapes = [(5, 16, 16), (3, 16, 16)]
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(1, 2, 3, stop=3), shapes=shapes)
    assert sum(map(len, stored()["points"].values())) == 3
    timer = Scripted(1, 2, 3)
    lines = run(timer, shapes=shapes)
    assert timer.calls == 1
    assert [line.endswith("already measured") for line in lines] == [True] * 3 + [False]
    assert all(tile == TILES[0]._asdict() for tile in stored()["tiles"].values())
    timer = Scripted(3, 2, 1)
    run(timer, shapes=shapes, again=True)
    assert timer.calls == 4
    assert all(tile == TILES[2]._asdict() for tile in stored()["tiles"].values())


def test_two_processes_lose_nothing_of_each_other() -> None:
    path = fill()
    code = (
        "import json, sys, time; from pathlib import Path\n"
        "from bigops.backend import gpu_tiles\n"
        "from bigops.tune import tiles\n"
        "from bigops.tune.measured import TunedFile\n"
        "path, of, name = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]\n"
        "file = TunedFile(gpu_tiles, of, tiles.SECTIONS)\n"
        "point = {'seconds': {'[32, 32, 32, 2, 4, 2, 2]': 1.0}, 'failed': {}}\n"
        "(path.parent / f'{name} is ready').touch()\n"
        "while len(list(path.parent.glob('* is ready'))) < 2: time.sleep(1e-3)\n"
        "for i in range(8):\n"
        "    tiles.keep(file, f'fused_linear: {name}', str(i), point)\n"
        "    tiles.keep(file, 'fused_linear: both', name + str(i), point)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), json.dumps(MACHINE), name], env={**os.environ}
        )
        for name in ("a", "b")
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    points = stored()["points"]
    sizes = {key.split()[1]: len(of) for key, of in points.items() if "aligned" not in key}
    assert sizes == {"a": 8, "b": 8, "both": 16}


def _with(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {**data, **changes}


def _tile(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return _with(tiles={KEY: {**TILES[0]._asdict(), **changes}})


BAD_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another format": (_with(format="bigops-gpu-tiles-0"), "expected 'bigops-gpu-tiles-1'"),
    "a list": (lambda data: [data], "got 'list'"),
    "another triton": (_with(machine={**MACHINE, "triton": "3.8.0"}), "another GPU, triton"),
    "another torch": (_with(machine={**MACHINE, "torch": "2.0"}), "another GPU, triton"),
    "no tiles": (_with(tiles=[]), "tiles: expected a mapping; got list"),
    "a tile without fields": (_with(tiles={KEY: {"block_m": 32}}), "expected the fields block_m"),
    "a tile of 33": (_tile(block_m=33), "block_m: expected a size in its range; got 33"),
    "a tile of 8": (_tile(block_k=8), "block_k: expected a size in its range; got 8"),
    "a tile of a float": (_tile(num_warps=4.0), "num_warps: expected a size in its range"),
    "a tile of 64 warps": (_tile(num_warps=64), "num_warps: expected a size in its range"),
    "a further field of text": (_tile(persistent="yes"), "persistent: expected a size in its"),
    "a time of 0": (
        _with(points={KEY: {"1x1x1": {"seconds": {NAMES[0]: 0}, "failed": {}}}}),
        "expected seconds above 0",
    ),
    "a point of another kind": (_with(points={KEY: {"1x1x1": 3.0}}), "expected seconds above 0"),
}


@pytest.mark.usefixtures("three_tiles")
@pytest.mark.parametrize("bad", ["cut off", *BAD_FILES])
def test_a_file_that_cannot_serve_is_named_and_ignored(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fill()
    change, message = BAD_FILES.get(bad, (None, "expected JSON written by `bigops tune`"))
    text = path.read_text()
    path.write_text(text[:80] if change is None else json.dumps(change(json.loads(text))))
    table = serve(monkeypatch)
    assert (table.tiles, table.source) == ({}, "committed")
    assert str(path) in table.ignored
    assert message in table.ignored
    with pytest.warns(UserWarning, match="tuned tiles are ignored"):
        served = explain(
            "fused_linear", torch.ones(20, 32), torch.ones(48, 32), device=MACHINE["arch"]
        )
    assert served.config["file"] == "interpreter.json"
    assert bigops.report()["tiles"][0]["ignored"] == table.ignored
    fill()  # writes a sound one in its place
    assert serve(monkeypatch).source == str(path)


def test_files_of_other_versions_of_triton_are_named(
    cache: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu_tiles.current(MACHINE).ignored == ""
    old = {**MACHINE, "triton": "3.8.0"}
    tune_gpu.tune(Target(TARGET.device, old), [], [], [])
    table = serve(monkeypatch)
    assert table.tiles == {}
    assert "expected a file of triton 3.9.0" in table.ignored
    assert gpu_tiles.tuned_file(old).name in table.ignored
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Some GPU 80GB: committed" in shown
    assert f"tuned tiles are ignored: {table.ignored}" in shown


def test_a_file_belongs_to_one_gpu_and_its_versions() -> None:
    names = {gpu_tiles.tuned_file(MACHINE)}
    for key in MACHINE:
        names.add(gpu_tiles.tuned_file({**MACHINE, key: "other"}))
    assert len(names) == 5
    assert all(name.name.startswith("gpu-") for name in names)


@pytest.mark.usefixtures("three_tiles")
def test_a_cache_that_cannot_be_written_costs_no_time(cache: Path) -> None:  # noqa: F811
    (cache / "bigops").write_text("a file where the folder should be")
    timer = Scripted()
    with pytest.raises(OSError, match="bigops"):
        run(timer)
    assert timer.calls == 0


# --- what serves ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("three_tiles")
def test_what_was_measured_serves_from_the_next_start_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(*SHAPE)
    x, weight = case.x, case.weight
    before = explain("fused_linear", x, weight, device="interpreter")
    assert before.config["num_stages"] == 2
    assert "kernels/configs" in before.reason
    run(Scripted(3, 2, 1))
    assert explain("fused_linear", x, weight, device="interpreter") == before  # not in this process
    table = serve(monkeypatch)
    after = explain("fused_linear", x, weight, device="interpreter")
    assert after.config["num_stages"] == 4
    assert after.config["file"] == table.source
    assert f"tuned on this device, from {table.source}" in after.reason
    with expect("triton.fused_linear.f32"):
        y = module.op._cuda(*case.inputs, "none")
    case.check_forward(y)
    other = explain("fused_linear", torch.randn(200, 32), weight, device="interpreter")
    assert "kernels/configs" in other.reason  # another bucket
    assert bigops.report()["tiles"] == [
        {"device": "Some GPU 80GB", "source": table.source, "tiles": 2, "ignored": ""}
    ]


@pytest.mark.parametrize("op", ["low_rank_linear", "sparse_linear", "quantized_linear"])
def test_explain_of_the_other_ops_names_the_tuned_file(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigops.formats.patterns import block_mask
    from bigops.formats.quantized import QuantizedWeight
    from bigops.formats.sparse import SparseWeight

    x, w = torch.randn(20, 64), torch.randn(64, 64)
    given: tuple[Any, ...] = (w[:, :16], w[:16])
    if op == "sparse_linear":
        given = (SparseWeight.from_mask(w, block_mask(w, 0.5, (16, 16)), torch.float32, (16, 16)),)
    elif op == "quantized_linear":
        given = (QuantizedWeight.from_dense(w),)
    before = explain(op, x, *given, device="interpreter")
    run(Scripted(), ops=[op], shapes=[(20, 64, 64)])
    table = serve(monkeypatch)
    after = explain(op, x, *given, device="interpreter")
    assert after.config["file"] == table.source
    assert {**after.config, "file": before.config["file"]} == before.config  # there is one tile
    assert "tuned on this device" in after.reason


def test_a_tile_of_no_config_file_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    path = fill()
    data = stored()
    gated = KEY.replace("plain", "gated")
    data["tiles"][gated] = TileConfig(32, 16, 32, 2, 4, 2, 1)._asdict()
    data["tiles"][KEY] = TileConfig(64, 64, 64, 8, 8, 3, 1)._asdict()
    data["tiles"]["another_op: plain aligned f32 m16"] = data["tiles"][gated]
    data["tiles"]["nonsense"] = data["tiles"][gated]
    data["tiles"][gated + "0"] = {**data["tiles"][gated], "no_field": 1}
    path.write_text(json.dumps(data))
    table = serve(monkeypatch)
    assert list(table.tiles) == [gated]
    assert (
        f"left out: {KEY}, another_op: plain aligned f32 m16, nonsense, {gated}0" in table.ignored
    )
