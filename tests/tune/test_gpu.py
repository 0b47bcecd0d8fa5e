"""`bigops tune --device cuda` without a GPU: its keys, its file, what is resumed, what serves.

The kernels run in the interpreter and the timer is scripted, so that all but the clock is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import bigops
from bigops import cli, explain, timing
from bigops.backend import gpu_tiles
from bigops.kernels.common import tuned
from bigops.kernels.common.tiles import TileConfig
from bigops.ops import targets
from bigops.ops import tuned as _triton_tuned
from bigops.tune import tiles as tune_gpu
from bigops.tune.measured import TunedFile
from bigops.tune.problems import PROBLEMS
from bigops.tune.tiles import Target
from tests.support import triton_interpreter
from tests.support.backends import covering
from tests.support.cases.linear import make
from tests.support.kernels_ran import expect

triton_interpreter.install()
module = sys.modules["bigops.ops.fused_linear"]

MACHINE = gpu_tiles.machine("Some GPU 80GB", "interpreter", "3.9.0")
TARGET = Target(torch.device("cpu"), MACHINE)
FILE = TunedFile(gpu_tiles, MACHINE, tune_gpu.SECTIONS)
TILES = [TileConfig(32, 32, 32, 2, 4, stages, 2) for stages in (2, 3, 4)]
NAMES = [json.dumps(list(tile)) for tile in TILES]
SHAPE = (20, 48, 32)
KEY = "fused_linear: plain aligned f32 m32-n64-k32"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty user's cache, and no tuned tiles afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    for memo in (_triton_tuned.tables, _triton_tuned.hand_over, targets.unserved):
        getattr(memo, "cache_clear", lambda: None)()
    tuned.clear()


@pytest.fixture
def three_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton_tuned, "candidates", lambda *_: TILES)


class Scripted:
    """A timer that makes each call once and gives set seconds, by tile."""

    def __init__(self, *seconds: float, stop: int | None = None) -> None:
        self.seconds = dict(zip(NAMES, seconds, strict=False))
        self.calls, self.stop = 0, stop

    def __call__(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        for call in calls.values():
            call()
        return {name: self.seconds.get(name, 1.0) for name in calls}


def run(timer: Scripted, **more: Any) -> list[str]:
    lines: list[str] = []
    options: dict[str, Any] = {"ops": ["fused_linear"], "shapes": [SHAPE], "dtypes": ["f32"]}
    tune_gpu.tune(TARGET, **{**options, **more}, report=lines.append, timer=timer)
    return lines


def fill() -> Path:
    """A file that holds what a run would write, without one."""
    path = gpu_tiles.tuned_file(MACHINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    tune_gpu.keep(FILE, KEY, "20x48x32", point(3, 2, 1))
    return path


def stored() -> dict[str, Any]:
    return gpu_tiles.read(gpu_tiles.tuned_file(MACHINE), MACHINE)


def serve(monkeypatch: pytest.MonkeyPatch) -> gpu_tiles.Table:
    """What a new process on such a GPU would serve by."""
    table = _triton_tuned.checked(gpu_tiles.current(MACHINE))
    forget()
    monkeypatch.setattr(_triton_tuned, "tables", lambda: {"interpreter": table})
    return table


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


# --- the choice ----------------------------------------------------------------------------------


def point(*seconds: float | None) -> dict[str, Any]:
    pairs = zip(NAMES, seconds, strict=True)
    return {"seconds": {n: s for n, s in pairs if s is not None}, "failed": {}}


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
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
def test_a_cache_that_cannot_be_written_costs_no_time(cache: Path) -> None:
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


# --- requests and the command --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ops": ["conv"]}, "op: expected one of fused_linear, .*got 'conv'"),
        ({"dtypes": ["f64"]}, "dtype: expected one of f32, bf16, f16; got 'f64'"),
        ({"shapes": [(1, 0, 3)]}, r"shapes: expected M,N,K of at least 1 each; got \(1, 0, 3\)"),
    ],
)
def test_bad_requests(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Scripted(), **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "fused_linear"], "--op, --shapes: expected with --device cuda only"),
        (["--device", "tpu"], "device: expected cpu, cuda or cuda:N; got 'tpu'"),
        (["--device", "meta"], "device: expected cpu, cuda or cuda:N; got 'meta'"),
        (["--device", "cuda"], "torch sees no GPU here; got 'cuda'"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", *arguments]) == cli.MISUSE
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", "--device", "cuda", "--shapes", "4,4"])
    assert "expected M,N,K of at least 1 each, got '4,4'" in capsys.readouterr().err


@pytest.mark.usefixtures("three_tiles")
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is this CPU, by a clock that is scripted."""
    monkeypatch.setattr(tune_gpu, "target_of", lambda device: TARGET)
    monkeypatch.setattr(tune_gpu, "_medians", lambda calls, device: Scripted(3, 1, 2)(calls))
    words = ["tune", "--device", "cuda", "--op", "fused_linear", "--dtype", "fp32"]
    assert cli.main([*words, "--shapes", "20,48,32", "3,16,16"]) == 0
    shown = capsys.readouterr().out
    assert f"{KEY} at 20x48x32: {TILES[1]}, 1000000.0 us of 3 tiles" in shown
    assert "serves from the next start" in shown
    assert len(stored()["tiles"]) == 4


# --- the clock -----------------------------------------------------------------------------------


def test_events_stand_around_each_call_behind_a_flush_in_rotating_order() -> None:
    log: list[str] = []

    class Event:
        def record(self) -> None:
            log.append("|")
            self.at = len(log)

        def elapsed_time(self, end: Event) -> float:
            return 1000.0 * (end.at - self.at)

    samples = timing.interleave_events(
        {name: lambda name=name: log.append(name) for name in "ab"},
        pairs=2,
        warmup=1,
        event=Event,
        flush=lambda: log.append("f"),
        sync=lambda: log.append("s"),
    )
    assert "".join(log) == "abs" + "f|a|f|b|" + "f|b|f|a|" + "s"
    assert {name: list(of) for name, of in samples.items()} == {"a": [2, 2], "b": [2, 2]}
    with pytest.raises(ValueError, match="sides: expected at least one"):
        timing.interleave_events({})
    with pytest.raises(ValueError, match="pairs: expected at least 1, got 0"):
        timing.interleave_events({"a": lambda: None}, pairs=0)
