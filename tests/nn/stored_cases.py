"""Frozen layers of every kind, each between two that are trained, and what holds of their storage.

As a script: what each rank of the tests of torch.distributed runs; arguments: the case, a folder.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bigops.nn import (
    Fp8Linear,
    PackedGatedMLP,
    PackedLinear,
    PackedLowRankLinear,
    QuantLinear,
    QuantLowRankLinear,
    SparseLinear,
)
from bigops.nn.stored_parameter import StoredParameter

K, N = 128, 64


def _static(layer: Any) -> Any:
    layer.calibrate(torch.randn(4, K))
    return layer.freeze()


LAYERS: dict[str, Callable[[], Any]] = {
    "int8": lambda: QuantLinear(K, N).freeze(),
    "int8 zero": lambda: QuantLinear(K, N, symmetric=False).freeze(),
    "int8 static": lambda: _static(QuantLinear(K, N, symmetric=False, activations="static")),
    "int4": lambda: QuantLinear(K, N, bits=4, group=32, bias=False).freeze(),
    "fp8": lambda: Fp8Linear(K, N).freeze(),
    "fp8 block": lambda: Fp8Linear(K, N, scales="block").freeze(),
    "sparse int8": lambda: SparseLinear(K, N).freeze(),
    "sparse static": lambda: _static(SparseLinear(K, N, activations="static")),
    "sparse bf16": lambda: SparseLinear(K, N, values="bf16").freeze(),
    "2:4": lambda: SparseLinear(K, N, pattern="2:4", values="fp32").freeze(),
    "thawed": lambda: SparseLinear(K, N, pattern="1x1", values="fp32").freeze().thaw(),
    "low rank": lambda: QuantLowRankLinear(K, N, 16).freeze(),
    "packed": lambda: PackedLinear(K, N).freeze(),
    "packed low rank": lambda: PackedLowRankLinear(K, N, 16).freeze(),
    "packed gated": lambda: PackedGatedMLP(K, 96, N, bias=True).freeze(),
}


def is_packed(kind: str) -> bool:
    return kind.startswith("packed")


def between(kind: str) -> nn.Sequential:
    """A frozen layer between two that are trained."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, K), LAYERS[kind](), nn.ReLU(), nn.Linear(N, 4))


def rows() -> Tensor:
    return torch.randn(6, K, generator=torch.Generator().manual_seed(1))


def stored_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, StoredParameter)}


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(p).clone() for name, p in stored_of(model).items()}


def check_same(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """The storage has its class and the bits that it had."""
    found = bits_of(model)
    assert list(found) == list(kept)
    assert all(torch.equal(found[name], before) for name, before in kept.items())


def check_twin(model: nn.Module, twin: nn.Module) -> None:
    check_same(twin, bits_of(model))
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert [m.arguments() for m in twin.modules() if hasattr(m, "arguments")] == [
        m.arguments() for m in model.modules() if hasattr(m, "arguments")
    ]
    with torch.no_grad():
        assert torch.equal(twin(rows()), model(rows()))


def blank(model: nn.Module) -> nn.Module:
    """All numbers are 0 but the pointers of sparse storage, which a thawed layer reads."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("ptr"):
                p.zero_()
    return model


# --- what a rank runs ---------------------------------------------------------------------------


def _trained_whole(kind: str) -> nn.Module:
    """The model after a step of SGD on all rows of x, in one process."""
    model = between(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(rows()).square().mean().backward()
    optimizer.step()
    return model


def _step(model: nn.Module) -> nn.Module:
    """One on the rows of this rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(rows().chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
    optimizer.step()
    return model


def _ddp(kind: str) -> None:
    if kind.startswith("fp8"):
        return  # gloo of torch 2.13 sends no float8, and DDP sends all once to begin with
    model = between(kind)
    kept, trained = bits_of(model), [p for p in model.parameters() if p.requires_grad]
    sent: list[int] = []

    def count(state, bucket):  # type: ignore[no-untyped-def]
        sent.append(bucket.buffer().nbytes)
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, count)
    plain = [t.nbytes for t in wrapped.modules_buffers]
    assert plain == ([8] if kind == "sparse static" else []), (kind, plain)
    _step(wrapped)
    assert sum(sent) == sum(p.nbytes for p in trained), (kind, sent)
    check_same(model, kept)
    torch.testing.assert_close(
        [p for p in model.parameters() if p.requires_grad],
        [p for p in _trained_whole(kind).parameters() if p.requires_grad],
    )


def _sharded(kind: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = between(kind)
    fully_shard(model[1], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _my_shard(t: Tensor) -> Tensor:
    """What FSDP2 leaves this rank of a tensor."""
    parts = t.detach().chunk(dist.get_world_size())
    return parts[dist.get_rank()] if dist.get_rank() < len(parts) else t.detach()[:0]


def _check_shards(model: nn.Module, whole: nn.Module) -> None:
    expected = dict(whole.named_parameters())
    assert [n for n, _ in model.named_parameters()] == list(expected)
    for name, p in model.named_parameters():
        local, mine = p.to_local(), _my_shard(expected[name])  # type: ignore[attr-defined]
        assert p.requires_grad == expected[name].requires_grad, name
        if p.requires_grad:
            torch.testing.assert_close(local.detach(), mine)
        else:
            assert torch.equal(bits(local), bits(mine)), name


def _fsdp(kind: str) -> None:
    model = _step(_sharded(kind))
    _check_shards(model, _trained_whole(kind))


def _dcp(kind: str, folder: Path) -> None:
    plain = between(kind)
    dcp.save(plain.state_dict(), checkpoint_id=folder / f"{kind} plain")
    twin = blank(copy.deepcopy(plain))
    state = twin.state_dict()
    dcp.load(state, checkpoint_id=folder / f"{kind} plain")
    twin.load_state_dict(state)
    check_twin(plain, twin)
    model = _sharded(kind)
    if is_packed(kind):
        with pytest.raises(TypeError, match="panels: expected whole panels.*got a DTensor"):
            model.state_dict()
        return
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / kind)
    for get, set_ in (
        (get_model_state_dict, set_model_state_dict),
        (nn.Module.state_dict, nn.Module.load_state_dict),
    ):
        twin = blank(_sharded(kind))
        state = get(twin)
        dcp.load(state, checkpoint_id=folder / kind)
        set_(twin, state)
        _check_shards(twin, plain)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind in LAYERS:
        _ddp(kind)
        _fsdp(kind)
        _dcp(kind, Path(sys.argv[1]))
    dist.destroy_process_group()
