"""All sides of a small model: which take part, what a row says, and the files of a run."""

from __future__ import annotations

import csv
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import cli
from bigops.benches.harness import EAGER, LeftOut
from bigops.benches.models import (
    agreement,
    kinds,
    measure,
    own,
    rivals_onnx,
    rivals_openvino,
    rivals_torch,
    zoo,
)
from bigops.benches.models.agreement import Agreement
from bigops.benches.models.side import Side, nbytes, quiet
from bigops.benches.models.subject import Accuracy, Subject
from tests.support import tolerance

HERE = "tests.benches.models.small"
COLUMNS = (
    "op,model,inputs,provider,isa,threads,clock,median_us,spread,ratio_to_eager,ratio_low,ratio_high,"
    "rival,ratio_to_rival,rival_low,rival_high,alone_us,alone_to_eager,alone_to_rival,alone_low,"
    "alone_high,best_rival,cosine,argmax,accuracy,accuracy_value,nbytes,kinds,versions"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ALONE_SECONDS", 1e-4)


@pytest.fixture
def subject() -> Subject:
    return next(iter(zoo.subjects(f"{HERE}:tokens")))


def fixed(name: str, out: Callable[[Tensor], Tensor]) -> Callable[[Subject], Side]:
    """A side that computes from the model's own output."""
    return lambda subject: Side(name, lambda *x: out(subject.model(*x)), "isa", 1)


def eager(subject: Subject) -> Side:
    return fixed(EAGER, lambda y: y)(subject)


# --- sides -------------------------------------------------------------------------------------


def test_ours_are_near_the_model_and_smaller(subject: Subject) -> None:
    ours = own.makers(False)["bigops int8"](subject)
    with torch.no_grad():
        out, expected = ours.call(*subject.inputs), subject.model(*subject.inputs)
    assert tolerance.snr_db(out, expected.double()) > 30
    assert ours.nbytes is not None
    assert ours.nbytes < nbytes(subject.model)


def test_a_sparse_side_is_held_against_the_pruned_model(subject: Subject) -> None:
    ours = own.makers(False)[f"bigops {own.SPARSE}"](subject)
    assert ours.reference is not None
    with torch.no_grad():
        out = ours.call(*subject.inputs)
        assert tolerance.snr_db(out, ours.reference(*subject.inputs).double()) > 30
        assert tolerance.snr_db(out, subject.model(*subject.inputs).double()) < 30


def test_sides_leave_the_subject_as_it_was(subject: Subject) -> None:
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    for name in ("bigops int8", f"bigops {own.SPARSE}"):
        own.makers(False)[name](subject)
    after = subject.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_deploy_is_called_where_there_is_one(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(bigops, "deploy", raising=False)
    make = own.makers(False)["bigops deployed int8"]
    if not hasattr(bigops, "deploy"):
        with pytest.raises(LeftOut, match="no deploy in this version"):
            make(subject)
    given = []

    def deploy(model: nn.Module, inputs: object, dynamic: bool) -> nn.Module:
        given.append((inputs, dynamic, list(inspect.signature(model.forward).parameters)))
        return model

    monkeypatch.setattr(bigops, "deploy", deploy, raising=False)
    side = make(subject)
    assert given == [(subject.inputs, False, ["x0"])]
    assert side.call(*subject.inputs).shape == (2, 6, 64)


def test_int4_takes_part_in_decoding_alone() -> None:
    assert not [name for name in measure.makers(False) if "int4" in name]
    assert {"bigops int4", "openvino int4"} <= set(measure.makers(True))


def test_wrong_sides_are_errors_and_eager_is_always_there() -> None:
    assert list(measure.chosen(["bigops int8"], False)) == ["bigops int8", EAGER]
    with pytest.raises(ValueError, match="side: expected a part of .*; got 'tensorrt'"):
        list(measure.run([f"{HERE}:tokens"], sides=["tensorrt"]))


def test_a_wrong_model_is_an_error_before_any_is_measured() -> None:
    with pytest.raises(ValueError, match="got 'gpt-5'"):
        next(measure.run([f"{HERE}:tokens", "gpt-5"]))


def test_rivals_that_are_not_installed_are_left_out(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for rivals in (rivals_onnx.makers(), rivals_openvino.makers(True)):
        for make in rivals.values():
            with pytest.raises(LeftOut, match="is not installed"):
                make(subject)


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("openvino fp32", ["openvino"]),
        ("openvino int8", ["openvino", "nncf"]),
        ("onnxruntime int8 dynamic", ["onnxruntime", "onnxscript"]),
        ("onnxruntime int8 static", ["onnxruntime", "onnxscript"]),
    ],
)
def test_rivals_that_are_installed_compute_the_model(
    name: str, packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subject = next(iter(zoo.subjects(f"{HERE}:with_calibration")))
    with quiet(), torch.no_grad():
        side = measure.makers(False)[name](subject)
        expected = subject.model(*subject.inputs)
        assert Agreement.of(side.call(*subject.inputs), expected, False).cosine > 0.99
        again = Agreement.of(
            side.call(*subject.calibration[0]), subject.model(*subject.calibration[0]), False
        )
    assert again.cosine > 0.99
    assert side.nbytes is not None
    assert len(list((tmp_path / "bigops").rglob("*.bin"))) == (name == "openvino int8")


def test_a_compiled_side_is_compiled_once_with_its_weights_frozen(subject: Subject) -> None:
    from torch._inductor import config

    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(config.freezing)
        return graph

    call = rivals_torch.frozen(subject.model, subject.inputs, backend)
    with torch.no_grad():
        torch.testing.assert_close(call(*subject.inputs), subject.model(*subject.inputs))
    assert seen == [True]
    assert not config.freezing


# --- rows --------------------------------------------------------------------------------------


def test_a_row_has_accuracy_agreement_and_the_ratio_to_the_faster_int8(subject: Subject) -> None:
    class Slow:
        def __call__(self, y: Tensor) -> Tensor:
            sum(range(200_000))
            return y

    judged = Accuracy("share", lambda call: float(call(*subject.inputs).mean() * 0 + 7))
    with_accuracy = Subject("m", subject.model, subject.inputs, [], judged, classes=True)
    makes = {
        "bigops int8": fixed("bigops int8", lambda y: y + 1e-3 * y.flip(-1)),
        EAGER: eager,
        "openvino int8": fixed("openvino int8", Slow()),
        "openvino int8 bf16": fixed("openvino int8 bf16", lambda y: y),
    }
    rows = measure.of_subject(with_accuracy, makes, 3)
    assert [row.provider for row in rows] == list(makes)
    mine = rows[0]
    assert {row.rival for row in rows} == {"openvino int8 bf16"}
    assert rows[3].ratio_to_rival == 1.0
    assert (mine.accuracy, mine.accuracy_value) == ("share", 7.0)
    assert mine.argmax is not None
    assert 0.999 < mine.cosine < 1.0
    assert rows[1].cosine == pytest.approx(1.0)
    text = measure.table(rows)
    assert all(name in text for name in makes)
    assert "m 2x6 (1 threads, wall time; vs ov: openvino int8 bf16)" in text


def test_a_failing_side_is_said_and_left_out(
    subject: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(subject: Subject) -> Side:
        raise RuntimeError("no such kernel, of this test")

    makes = {
        "bigops int8": broken,
        EAGER: eager,
        "openvino fp32": fixed("openvino fp32", lambda y: -y),
    }
    rows = measure.of_subject(subject, makes, 1)
    assert [row.provider for row in rows] == [EAGER]
    said = capsys.readouterr().err
    assert "bigops int8 FAILED: RuntimeError: no such kernel, of this test" in said
    assert "openvino fp32 left out: cosine -1.00" in said


def test_the_command_writes_csv_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    files = ("--csv", str(tmp_path / "m.csv"), "--plot", str(tmp_path / "m.png"))
    code = cli.main(
        ["bench", "--model", f"{HERE}:tokens", "--side", "bigops int8", "--pairs", "1", *files]
    )
    assert code == 0
    assert "bigops int8: product=" in capsys.readouterr().out.replace("python=", "product=")
    with open(tmp_path / "m.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert ",".join(header) == COLUMNS
    assert [line[header.index("provider")] for line in lines] == ["bigops int8", EAGER]
    assert (tmp_path / "m-models.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "gpt-5"), "model: expected one of minilm"),
        (("--model", "minilm", "--op", "x"), "expected one of --op, --model, --serve"),
        (("--side", "eager"), "--side: expected --model beside it"),
        (("--model", "minilm", "--summary", "s.md"), "expected neither --summary nor --device"),
        (("--serve", f"{HERE}:pictures"), "expected all of one shape [batch, tokens]"),
        (("--serve", "minilm", "--plot", "s.png"), "--serve: expected no --plot"),
        (("--model", "minilm", "--isa", "avx2"), "before torch is loaded"),
    ],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_cpu_clock_does_not_see_what_others_take() -> None:
    assert measure.cpu_timer(lambda: time.sleep(0.05))(2) < 0.05
    busy = measure.cpu_timer(lambda: sum(range(300_000)))
    assert busy(4) > 2 * busy(1) > 0


def test_the_cpu_clock_is_of_one_thread(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measure.of_subject(subject, {EAGER: eager}, 1, clock=measure.CPU)
    assert rows[0].clock == "cpu"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match="clock: expected one thread with cpu, got 2"):
        next(measure.run([f"{HERE}:tokens"], clock="cpu"))
    with pytest.raises(ValueError, match="clock: expected wall or cpu, got 'sun'"):
        next(measure.run([f"{HERE}:tokens"], clock="sun"))


# --- agreement and kinds -----------------------------------------------------------------------


def test_agreement_is_of_directions_and_classes() -> None:
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert Agreement.of(truth * 3, truth, True) == Agreement(pytest.approx(1.0), 1.0)
    half = Agreement.of(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), truth, True)
    assert half == Agreement(pytest.approx(0.5), 0.5)
    assert agreement.wrong(Agreement(float("nan"), None))
    assert agreement.wrong(Agreement(0.3, None))
    assert not agreement.wrong(Agreement(0.9, 0.2))
    with pytest.raises(ValueError, match="out: expected shape"):
        Agreement.of(truth[:1], truth, False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "product"),
        ("bigops::quantized_linear", "product"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::native_layer_norm", "norm"),
        ("aten::gelu", "activation"),
        ("aten::add_", "add"),
        ("aten::_to_copy", "copy"),
        ("aten::arange", "other"),
    ],
)
def test_an_operator_has_a_kind(name: str, kind: str) -> None:
    assert kinds.kind(name) == kind


def test_shares_add_up_and_products_lead_where_they_are_all() -> None:
    model, x = nn.Linear(512, 2048), torch.ones(64, 512)
    with torch.no_grad():
        found = kinds.shares(lambda: model(x))
    assert sum(found.values()) == pytest.approx(1.0, abs=0.02)
    assert max(found, key=lambda name: found[name]) == "product"
    assert kinds.text({"add": 0.25, "product": 0.75}) == "product=75% add=25%"
