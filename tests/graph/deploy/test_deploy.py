"""bigops.deploy: right for the sizes that it takes, refused by name for what it does not."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from tests.graph.deploy.encoder import Encoder, inputs
from tests.support import tolerance


def check(deployed: nn.Module, model: nn.Module, given: dict[str, Tensor]) -> None:
    """Hold a deployed float32 model to the float64 one by the numerics rule."""
    with torch.no_grad():
        plain = model(**given)
        wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        truth = model.double()(**wide)
        model.float()
        got = deployed(**given)
    for name, ref in truth.items():
        tolerance.check(got[name], ref, plain[name], ref.abs().max() + 1, what=name)


@pytest.mark.parametrize(("batch", "length"), [(3, 7), (1, 7), (5, 1), (1, 1), (2, 20)])
def test_it_gives_what_the_model_gives_at_other_sizes(
    deployed: Any, model: Encoder, batch: int, length: int
) -> None:
    check(deployed, model, inputs(batch, length))


def test_a_batch_of_one_as_the_example_does_not_fix_the_batch(model: Encoder) -> None:
    deployed = bigops.deploy(model, inputs(1, 7))
    check(deployed, model, inputs(4, 9))


def test_nothing_is_left_between_the_products(deployed: Any) -> None:
    calls = deployed.calls()
    assert calls["bigops.packed_linear.code"] == 4  # q, k and v are one
    assert calls["bigops.norm.code"] == 2
    assert not {"aten.linear.default", "aten.gelu.default", "aten.layer_norm.default"} & set(calls)
    # the sum of the embeddings, none of a residual
    assert calls["aten.add.Tensor"] == 1


def test_arguments_come_by_position_or_keyword(deployed: Any) -> None:
    given = inputs(2, 5)
    a, b = deployed(**given), deployed(given["ids"], given["mask"])
    assert torch.equal(a["last"], b["last"])
    assert list(a) == ["last", "pooled"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mask": torch.ones(2, 6)}, ValueError, "mask"),
        ({"ids": torch.zeros(2, 5)}, TypeError, "int64"),
        ({"ids": torch.zeros(2, 5, 1, dtype=torch.long)}, ValueError, "shape"),
        ({"ids": [1, 2]}, TypeError, "ids"),
        ({"more": torch.ones(1)}, TypeError, "more"),
        ({"mask": None}, TypeError, "mask"),
    ],
)
def test_other_arguments_are_refused_by_name(
    deployed: Any, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        deployed(**{**inputs(2, 5), **change})


def test_a_length_beyond_the_table_of_positions_is_refused(deployed: Any) -> None:
    with pytest.raises(IndexError):  # by the embedding itself, as the model does
        deployed(torch.zeros(2, 21, dtype=torch.long), torch.ones(2, 21))


def test_a_missing_argument_and_too_many_are_named(deployed: Any) -> None:
    with pytest.raises(TypeError, match="mask: expected"):
        deployed(inputs(2, 5)["ids"])
    with pytest.raises(TypeError, match="at most 2"):
        deployed(*inputs(2, 5).values(), 3)
    with pytest.raises(TypeError, match="position and a keyword"):
        deployed(inputs(2, 5)["ids"], **inputs(2, 5))


def test_the_model_is_as_before_and_later_writes_do_not_reach_the_result(model: Encoder) -> None:
    mine = Encoder().train()
    state = {n: t.clone() for n, t in mine.state_dict().items()}
    example, random = inputs(3, 7), torch.get_rng_state()
    deployed = bigops.deploy(mine, example)
    assert torch.equal(random, torch.get_rng_state())
    assert mine.training
    assert mine.drop.training
    assert all(torch.equal(t, state[n]) for n, t in mine.state_dict().items())
    given = inputs(2, 5)
    before = deployed(**given)["last"].clone()
    with torch.no_grad():
        for p in mine.parameters():
            p.add_(1.0)
    assert torch.equal(before, deployed(**given)["last"])


@pytest.mark.parametrize(
    "config",
    [
        bigops.Int8(),
        bigops.Int8(activations="static"),
        bigops.Sparse(0.5) + bigops.Int8(),
        bigops.Int4(),
    ],
    ids=str,
)
def test_a_compressed_model_stays_compressed(config: Any) -> None:
    torch.manual_seed(1)
    mine = Encoder().eval()
    bigops.compress_(
        mine, config, data=[inputs(4, 9) for _ in range(3)] if "static" in str(config) else None
    )
    deployed = bigops.deploy(mine, inputs(3, 7))
    given = inputs(2, 11)
    with torch.no_grad():
        wanted, got = mine(**given)["last"], deployed(**given)["last"]
    assert tolerance.snr_db(got, wanted) > 45  # rounded elsewhere: one step of x in 255
    dense = {tuple(b.shape) for b in deployed.buffers() if b.is_floating_point() and b.dim() > 1}
    assert not any(64 in shape and min(shape) >= 64 and shape != (100, 64) for shape in dense)


def test_what_is_not_frozen_is_refused() -> None:
    mine = nn.Sequential(bigops.nn.QuantLinear(64, 64))
    with pytest.raises(ValueError, match="0: expected a frozen layer"):
        bigops.deploy(mine, torch.randn(2, 64))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class One(nn.Module):
    """Another answer for a batch of one, of which torch.export knows nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] == 1 else x


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0] // 2, 2, -1).sum(1)


def test_what_cannot_be_exported_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="torch.export takes"):
        bigops.deploy(Branches(), torch.randn(3, 4))
    with pytest.raises(TypeError, match="arguments of forward"):
        bigops.deploy(One(), (torch.randn(3, 4), 2))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        bigops.deploy(lambda x: x, torch.randn(3, 4))  # type: ignore[arg-type]


def test_a_size_of_one_that_takes_another_branch_is_refused() -> None:
    deployed = bigops.deploy(One(), torch.randn(3, 4))
    x = torch.randn(2, 4)
    assert torch.equal(deployed(x), x)
    with pytest.raises(ValueError, match="x: dimension 0: expected a size from 2"):
        deployed(torch.randn(1, 4))


def test_a_condition_on_sizes_is_kept() -> None:
    deployed = bigops.deploy(Halves(), torch.randn(4, 6))
    assert deployed(torch.randn(8, 6)).shape == (4, 6)
    with pytest.raises((ValueError, RuntimeError)):
        deployed(torch.randn(5, 6))


def test_sizes_of_the_example_alone() -> None:
    deployed = bigops.deploy(One(), torch.randn(3, 4), dynamic=False)
    with pytest.raises(ValueError, match="shape"):
        deployed(torch.randn(2, 4))
    with pytest.raises(TypeError, match="dynamic"):
        bigops.deploy(One(), torch.randn(3, 4), dynamic={"y": None})


def test_it_cannot_be_trained(deployed: Any) -> None:
    with pytest.raises(RuntimeError, match="eval"):
        deployed.train()
    assert not deployed(**inputs(2, 5))["last"].requires_grad


def test_autocast_outside_changes_nothing(deployed: Any) -> None:
    given = inputs(2, 5)
    plain = deployed(**given)["last"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(deployed(**given)["last"], plain)


def test_threads_call_it_at_once(deployed: Any) -> None:
    given = [inputs(2, 5 + i) for i in range(4)]
    alone = [deployed(**g)["last"] for g in given]
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def run(i: int) -> None:
        for _ in range(10):
            found[i].append(deployed(**given[i])["last"])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        assert len(found[i]) == 10
        assert all(torch.equal(y, alone[i]) for y in found[i])


_READER = """
import sys, torch, bigops
model = bigops.load(sys.argv[1], mapped=True)
given = torch.load(sys.argv[2])
assert "tests.graph.deploy.test_deploy" not in sys.modules
torch.save(model(**given), sys.argv[3])
"""


def test_a_file_is_read_without_the_models_code(deployed: Any, tmp_path: Path) -> None:
    path, given = tmp_path / "model.safetensors", inputs(2, 5)
    bigops.save(deployed, path)
    torch.save(given, tmp_path / "in.pt")
    files = [str(path), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", _READER, *files], check=True, timeout=300)
    out = torch.load(tmp_path / "out.pt")
    assert torch.equal(out["last"], deployed(**given)["last"])
    again = bigops.load(path)
    assert torch.equal(again(**given)["last"], out["last"])
    assert again.counts == deployed.counts


def test_a_mapped_file_is_not_written(deployed: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    bigops.save(deployed, path)
    before = path.read_bytes()
    mapped = bigops.load(path, mapped=True)
    with torch.no_grad():
        next(b for b in mapped.buffers() if b.is_floating_point()).add_(1)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="mapped"):
        bigops.load(path, device="meta", mapped=True)


class Cache(nn.Module):
    """State of its own that each call writes, as a static key-value cache is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(4, 6))

    def forward(self, at: Tensor, x: Tensor) -> Tensor:
        self.kept.index_copy_(0, at, x)
        return self.kept.sum(0)


def test_state_is_the_deployed_models_own() -> None:
    model = Cache()
    deployed = bigops.deploy(model, (torch.tensor([1]), torch.ones(1, 6)), dynamic=False)
    assert not model.kept.any()
    assert deployed(torch.tensor([0]), torch.ones(1, 6)).sum() == 6
    assert deployed(torch.tensor([2]), torch.ones(1, 6)).sum() == 12
    assert not model.kept.any()


def test_explain_times_what_no_pass_took(deployed: Any) -> None:
    times = deployed.explain(**inputs(2, 5), runs=2)
    left = {call.op for call in times.left()}
    assert "aten.embedding.default" in left
    assert not any(op.startswith("bigops.") for op in left)
    assert "left to torch" in str(times)
    assert sum(times.by_op().values()) == pytest.approx(times.us)
