"""Files of models with low-rank layers: bitwise round trips, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigops import Int8, LowRank, compress_, load, save
from bigops.compress.store import load_compressed
from bigops.files import FormatError
from bigops.nn import LowRankLinear, QuantLinear, QuantLowRankLinear
from tests.compress.test_low_rank import compressed_model, dense_model, snapshot
from tests.support.saved_models import rewrite_as_older


@pytest.mark.parametrize("freeze", [True, False])
def test_a_file_gives_the_model_back_bitwise(freeze: bool, tmp_path: Path) -> None:
    model, x = compressed_model(freeze), torch.randn(5, 64)
    save(model, tmp_path / "m")
    other = compressed_model(freeze)
    with torch.device("meta"):
        skeleton = dense_model()
    for again in (
        load(tmp_path / "m"),
        load(tmp_path / "m", skeleton),
        load(tmp_path / "m", other),
    ):
        again.eval()
        assert [type(m) for m in again] == [type(m) for m in model]
        assert [getattr(m, "rank", None) for m in again] == [6, 5, None, None]
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
        names = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in again.named_parameters()] == names


def test_the_file_holds_the_factors_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    save(model, tmp_path / "dense")
    compress_(model, LowRank(32) + Int8())
    save(model, tmp_path / "small")
    assert (tmp_path / "dense").stat().st_size > 25 * (tmp_path / "small").stat().st_size
    found = load_compressed(tmp_path / "small")
    assert torch.equal(found["0"].dense_weight(), model[0].dense_weight())
    save(compressed_model(), tmp_path / "three")
    assert [type(m) for m in load_compressed(tmp_path / "three").values()] == [
        QuantLowRankLinear,
        LowRankLinear,
        QuantLinear,
    ]


def _child(header: dict[str, Any], name: str) -> Any:
    return header["tree"]["children"][name]


CHANGES: dict[str, tuple[Any, str]] = {
    "another rank": (
        lambda h, t: _child(h, "0")["args"].update(rank=5),
        "u_values: expected zeros beyond column 5",  # tiles of 16 and lines of 4 fit both
    ),
    "a rank above the smaller side": (
        lambda h, t: _child(h, "0")["args"].update(rank=49),
        "rank: expected 0 to 48",
    ),
    "a rank that is none": (
        lambda h, t: _child(h, "1")["args"].update(rank="5"),
        "rank: expected a whole number from 0; got '5'",
    ),
    "another rank of float factors": (
        lambda h, t: _child(h, "1")["args"].update(rank=4),
        r"1\.u: the model expects shape \[24, 4\]",
    ),
    "huge": (
        lambda h, t: _child(h, "0")["args"].update(in_features=1 << 70),
        "1180591620717411303",
    ),
    "no scale": (lambda h, t: t.__delitem__("0.u_scale"), r"u_scale"),
    "a bad scale": (
        lambda h, t: t["0.v_scale"].__setitem__((0, 0), -1.0),
        "v_scale: expected finite values above 0",
    ),
    "bad sums": (lambda h, t: t["0.u_row_sum"].add_(1) is None, "u_row_sum: expected the sums"),
    "a bad dtype": (
        lambda h, t: t.update({"0.v_values": t["0.v_values"].float()}),
        "v_values: expected dtype int8",
    ),
    "whole numbers as factors": (
        lambda h, t: t.update({"1.u": t["1.u"].to(torch.int32)}),
        "require gradients|1.u|floating",
    ),
    "no state": (lambda h, t: _child(h, "0")["args"].pop("frozen") and None, "frozen"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(compressed_model(), path)
    change, message = CHANGES[name]
    rewrite_as_older(path, change)
    skeleton = dense_model()
    before = snapshot(skeleton)
    for model in (None, skeleton):
        with pytest.raises(FormatError, match=message) as caught:
            load(path, model=model)
        assert path.name in str(caught.value)
    assert snapshot(skeleton) == before


def test_a_model_of_other_sizes_stays_as_it_was(tmp_path: Path) -> None:
    save(compressed_model(), tmp_path / "m")
    other = dense_model()
    other[0] = nn.Linear(65, 48)
    before = snapshot(other)
    with pytest.raises(FormatError, match="in_features 64; the model's has 65"):
        load(tmp_path / "m", model=other)
    assert snapshot(other) == before
