"""Reload a saved model in this process and write its logits: the demo runs it in a new one.

python -m bigops.recipes.reload MODEL INPUTS LOGITS BATCH THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigops.compress.store import load


def logits(model: nn.Module, x: Tensor, batch: int) -> Tensor:
    """Logits [rows, classes] in eval and inference mode, ``batch`` rows a call."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(part) for part in x.split(batch)])


def main(arguments: Sequence[str]) -> None:
    """Load MODEL, run it on ``x`` of INPUTS, write ``logits`` to LOGITS."""
    model, inputs, out, batch, threads = arguments
    torch.set_num_threads(int(threads))
    result = logits(load(model), load_file(inputs)["x"], int(batch))
    save_file({"logits": result.clone()}, out)


if __name__ == "__main__":
    main(sys.argv[1:])
