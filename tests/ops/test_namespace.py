"""`torch.ops.bigops`: there after `import bigops`, which registers nothing itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bigops


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_first_look_up_registers_the_ops() -> None:
    said = run(
        "import sys, bigops, torch\n"
        "print({'bigops.ops', 'bigops.nn', 'bigops._C', 'torch._dynamo'} & {*sys.modules})\n"
        "print(getattr(torch.ops.bigops, '__wrapped__', None), 'bigops.ops' in sys.modules)\n"
        "print(torch.ops.bigops.fused_linear.code, 'torch._dynamo' in sys.modules)\n"
        "print(hasattr(torch.ops.bigops, 'no_such_op'))\n"
    )
    assert said.splitlines() == [
        "set()",
        "None False",
        "bigops.fused_linear.code False",
        "False",
    ]


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = bigops.fused_linear(x, self.weight, activation="gelu")
        return y + bigops.low_rank_linear(x, self.weight[:, :2], self.weight[:2])


class Loss(Dense):
    def forward(self, x: Tensor) -> Tensor:
        target = torch.zeros(x.shape[0], dtype=torch.int64)
        return bigops.linear_cross_entropy(x, self.weight, target)


class Stored(Dense):
    def __init__(self) -> None:
        super().__init__()
        dense = self.weight.detach()
        self.int8 = bigops.formats.QuantizedWeight.from_dense(dense)
        self.packed = bigops.formats.PackedWeight.from_dense(dense)

    def forward(self, x: Tensor) -> Tensor:
        return bigops.quantized_linear(x, self.int8) + bigops.packed_linear(x, self.packed)


@pytest.mark.slow
@pytest.mark.parametrize("model", [Dense, Loss, Stored])
@pytest.mark.parametrize("imports", ["import torch, bigops", "import bigops, torch"])
def test_an_exported_program_loads_in_another_process(
    tmp_path: Path, model: type[nn.Module], imports: str
) -> None:
    torch.manual_seed(0)
    made, x = model().eval(), torch.randn(4, 16)
    want, path = made(x), tmp_path / "model.pt2"
    torch.export.save(torch.export.export(made, (x,)), path)
    torch.save((x, want), tmp_path / "tensors.pt")
    run(
        f"{imports}\n"
        f"x, want = torch.load({str(tmp_path / 'tensors.pt')!r})\n"
        f"got = torch.export.load({str(path)!r}).module()(x)\n"
        "assert torch.allclose(got, want, atol=1e-5), (got, want)"
    )
