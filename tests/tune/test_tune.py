"""`bigops tune`: crossovers are measured, chosen, kept, read back, never taken from elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

import bigops
from bigops import backend, cli
from bigops.backend import crossover, machine
from bigops.graph import pack_
from bigops.nn import Linear
from bigops.tune import crossovers as tune
from tests.support.kernels_ran import expect, needs_extension

pytestmark = needs_extension
Sides = Mapping[str, Callable[[], object]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty user's cache; afterwards the crossovers are this session's again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    machine.crossovers.cache_clear()
    machine.apply_crossovers()


def reread() -> crossover.Table:
    """What a new process would serve by."""
    machine.crossovers.cache_clear()
    machine.apply_crossovers()
    return machine.crossovers()


def point(m: int, own: float, library: float, packed: float = 1.0, k: int = 100) -> tune.Point:
    return tune.Point(m, k, 100, own, library, packed)


# --- the choice --------------------------------------------------------------------------------


def test_own_kernel_up_to_the_rows_where_it_is_faster() -> None:
    points = [point(1, 1, 3), point(4, 2, 3), point(16, 5, 3), point(64, 9, 4)]
    assert tune.choose(points) == crossover.Limits(4, 0)
    assert tune.worst(points, crossover.Limits(4, 0)) == 1
    assert tune.worst(points, crossover.Limits(16, 0)) == pytest.approx(5 / 3)


def test_small_products_of_many_rows_are_told_by_their_operations() -> None:
    large = [point(1, 1, 3, k=10_000), point(64, 9, 3, k=10_000)]
    small = [point(1, 1, 3), point(64, 2, 3)]
    assert tune.choose(large + small) == crossover.Limits(1, 2 * 64 * 100 * 100)


def test_a_side_that_never_wins_serves_nothing() -> None:
    assert tune.choose([point(1, 2, 1), point(8, 2, 1)]) == crossover.Limits(0, 0)
    with pytest.raises(ValueError, match="points: expected at least one"):
        tune.choose([])


def test_packing_is_held_against_what_the_limits_take() -> None:
    points = [point(1, 1.0, 9.0, packed=1.1), point(64, 9.0, 1.0, packed=1.1)]
    assert not tune.packing_wins(points, crossover.Limits(1, 0))
    assert tune.packing_wins(points, crossover.Limits(64, 0))


# --- measuring and keeping ---------------------------------------------------------------------


class Scripted:
    """A timer that runs each side once, says which kernels ran, and gives set seconds."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds, self.kernels, self.calls = seconds, {}, 0  # type: ignore[var-annotated]

    def __call__(self, sides: Sides) -> dict[str, float]:
        self.calls += 1
        for name, call in sides.items():
            with backend.record() as ran:
                call()
            self.kernels.setdefault(name, set()).update(ran)
        return {name: self.seconds[name] for name in sides}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "LAYERS", ((33, 20),) * 3)
    monkeypatch.setattr(tune, "ROWS", (1, 64))


LIBRARY_FIRST = {"own": 2.0, "library": 1.0, "packed": 3.0, "aten": 1.0, "onednn": 2.0}
OWN_FIRST = {"own": 1.0, "library": 2.0, "packed": 0.5, "aten": 2.0, "onednn": 1.0}


@pytest.mark.usefixtures("small")
def test_what_was_measured_serves_from_the_next_start_on() -> None:
    timer, lines = Scripted(LIBRARY_FIRST), []
    path = tune.tune(["f32"], report=lines.append, timer=timer)
    (own,), (packed,) = timer.kernels["own"], timer.kernels["packed"]
    assert own.startswith("cpu.")
    assert ".fused_linear." in own
    assert "linear_" not in own[-20:]
    assert ".packed_linear." in packed
    assert all("torch_linear" in name or "epilogue" in name for name in timer.kernels["library"])
    assert lines[0] == "float32 products of a library: aten"
    assert "own kernel up to 0 rows or 0 operations, pack_ leaves it" in lines[1]
    table = reread()
    assert table.source == str(path)
    assert not table.ignored
    assert table.fused_linear["f32"] == crossover.Limits(0, 0)
    assert table.fused_linear["f64"] == crossover.committed(machine.extension).fused_linear["f64"]
    model, x = torch.nn.Sequential(Linear(300, 300)).eval(), torch.randn(1, 300)
    assert "panels do not pay" in (pack_(model).reason("0") or "")
    with torch.inference_mode(), expect("torch_linear"):
        model(x)
    tune.tune(["f32"], again=True, timer=Scripted(OWN_FIRST))
    reread()
    assert [done.name for done in pack_(model).done] == ["0"]
    with torch.inference_mode(), expect("packed_linear"):
        model(x)


@pytest.mark.usefixtures("small")
def test_nothing_moves_in_the_process_that_tunes() -> None:
    x, w = torch.randn(2, 33), torch.randn(20, 33)
    tune.tune(["f32"], timer=Scripted(LIBRARY_FIRST))
    with backend.record() as ran:
        torch.ops.bigops.fused_linear(x, w, None, None, "none")
    assert not any("torch" in name for name in ran), ran


@pytest.mark.usefixtures("small")
def test_a_run_that_was_cut_off_goes_on() -> None:
    class Cut(Scripted):
        def __call__(self, sides: Sides) -> dict[str, float]:
            if self.calls == 8 + 4:
                raise KeyboardInterrupt
            return super().__call__(sides)

    with pytest.raises(KeyboardInterrupt):
        tune.tune(["f32", "bf16"], timer=Cut(OWN_FIRST))
    lines: list[str] = []
    timer = Scripted(OWN_FIRST)
    path = tune.tune(["f32", "bf16"], report=lines.append, timer=timer)
    measured = json.loads(path.read_text())["fused_linear"]
    assert set(measured) <= {"f32", "bf16"}
    assert "bf16" in measured
    assert timer.calls <= 2 * 6 + 6


@pytest.mark.usefixtures("small")
def test_two_processes_lose_nothing_of_each_other() -> None:
    of = crossover.machine(machine.extension)
    path = tune.tune(["f32"], timer=Scripted(OWN_FIRST))
    code = (
        "import sys, time; from pathlib import Path; from bigops.tune import crossovers\n"
        "from bigops.backend import crossover, machine\n"
        "from bigops.tune.measured import TunedFile\n"
        "of, path = crossover.machine(machine.extension), Path(sys.argv[1])\n"
        "file = TunedFile(crossover, of, crossovers.SECTIONS)\n"
        "(path.parent / f'{sys.argv[2]} is ready').touch()\n"
        "while len(list(path.parent.glob('* is ready'))) < 2: time.sleep(1e-3)\n"
        "for i in range(15):\n"
        "    with file.editing() as data:\n"
        "        data['points'][sys.argv[2] + str(i)] = []"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name], env={**os.environ})
        for name in ("a", "b")
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    points = crossover.read(path, of)["points"]
    assert len(points) == 1 + 30


# --- files that cannot serve -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "expected JSON"),
        ({"format": 7}, "expected format 1; got 7"),
        ({"machine": {"cpu": "another"}}, "expected the machine"),
        ({"fused_linear": {"f32": {"max_rows": -1, "max_flops": 0}}}, "at least 0; got"),
        ({"fused_linear": {"f32": {"max_rows": "4", "max_flops": 0}}}, "whole numbers"),
        ({"fused_linear": {"fp8": {"max_rows": 4, "max_flops": 0}}}, "expected keys among"),
        ({"packs": {"f32": "no"}}, "expected true or false; got 'no'"),
        ({"float_product": "mkl"}, "expected one of aten, onednn; got 'mkl'"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_file_that_cannot_serve_is_named_and_changes_nothing(
    change: dict | None, message: str
) -> None:
    committed = crossover.committed(machine.extension)
    path = tune.tune(["f32"], timer=Scripted(LIBRARY_FIRST))
    text = path.read_text()
    path.write_text(text[:40] if change is None else json.dumps(json.loads(text) | change))
    with pytest.warns(UserWarning, match="tuned crossovers are ignored"):
        table = reread()
    assert table == committed  # `ignored` aside
    assert message in table.ignored
    assert str(path) in table.ignored
    assert table.ignored in bigops.report()["crossovers"]["ignored"]
    tune.tune(["f32"], timer=Scripted(LIBRARY_FIRST))  # writes a sound one in its place
    assert reread().source == str(path)


def test_a_file_is_of_one_machine() -> None:
    of = crossover.machine(machine.extension)
    names = {crossover.tuned_file(of)}
    for key, value in {"cpu": "other", "isa": "other", "threads": 99, "torch": "2.99"}.items():
        names.add(crossover.tuned_file({**of, key: value}))
    assert len(names) == 5
    assert all(name.parent == next(iter(names)).parent for name in names)


def test_features_of_the_cpu_change_the_committed_table() -> None:
    class Amx:
        features, vendor = staticmethod(lambda: ["amx-bf16"]), staticmethod(lambda: "intel")

    class Plain(Amx):
        features = staticmethod(lambda: [])

    with_amx, without = crossover.committed(Amx), crossover.committed(Plain)  # type: ignore[arg-type]
    assert with_amx.packs == without.packs
    assert with_amx.fused_linear["bf16"].max_rows < without.fused_linear["bf16"].max_rows
    assert with_amx.fused_linear["f32"] == without.fused_linear["f32"]
    assert not with_amx.bf16_dot


# --- bad requests and the command ----------------------------------------------------------------


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="dtype: expected one of f32, bf16, f16; got 'f64'"):
        tune.tune(["f64"])


@pytest.mark.usefixtures("small")
def test_a_cache_that_cannot_be_written_costs_no_time(cache: Path) -> None:
    (cache / "bigops").write_text("a file where the folder should be")
    timer = Scripted(OWN_FIRST)
    with pytest.raises(OSError, match="bigops"):
        tune.tune(["f32"], timer=timer)
    assert timer.calls == 0


@pytest.mark.usefixtures("small")
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ROUNDS", 1)
    assert cli.main(["tune", "--dtype", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "bf16: own kernel up to" in shown
    assert "serves from the next start" in shown
    assert cli.main(["tune", "--dtype", "bf16"]) == 0
    assert "bf16: already measured" in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0
