"""`bigops tune --device cuda` without a GPU: what it refuses, what it says, and its clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bigops import cli, timing
from bigops.tune import tiles as tune_gpu
from tests.support import triton_interpreter
from tests.tune.gpu_cases import (  # noqa: F401 - fixtures
    KEY,
    TARGET,
    TILES,
    Scripted,
    cache,
    run,
    stored,
    three_tiles,
)

triton_interpreter.install()

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
