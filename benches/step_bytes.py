"""Peak bytes of a training step, each side in a process of its own.

``python -m bigops.benches.step_bytes`` prints, for models of transformers with random weights, the
most bytes that forward and backward pass hold at a time beyond parameters, optimiser states and
gradients: activations, logits, what the products take. Counted are the blocks of torch's CPU
allocator; a gradient is one from when it is made: that of a head that `bigops.train.chunked_loss_`
serves in the forward pass. ``resident`` is the process's own most resident memory of two steps
with torch's fused AdamW beyond imports, parameters, gradients and states.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# class of the model and of its config, its arguments, rows and tokens of a batch
MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[int, int]]] = {
    "t5-small": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": 8,
            "decoder_start_token_id": 0,
            "tie_word_embeddings": True,
        },
        (8, 64),
    ),
    "llama-4x576": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        (4, 128),
    ),
}
SIDES = ("eager", "chunked loss", "and masks")
DTYPES = ("fp32", "bf16-mixed", "bf16")
STEPS = 2


class Training:
    """A model of one side and its steps."""

    def __init__(self, name: str, side: str, dtype: str, vocabulary: int | None = None) -> None:
        import torch
        import transformers

        import bigops.train

        torch.manual_seed(0)
        kind, config, options, size = MODELS[name]
        options = {**options, "vocab_size": vocabulary or options["vocab_size"]}
        self.model = getattr(transformers, kind)(getattr(transformers, config)(**options))
        self.model.train()
        if dtype == "bf16":
            self.model.bfloat16()
        if side != "eager":
            bigops.train.chunked_loss_(self.model)
        if side == "and masks":
            bigops.train.checkpoint_(self.model, "masks")
        self.mixed = dtype == "bf16-mixed"
        self.ids = torch.randint(3, options["vocab_size"], size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.loss = 0.0

    def gradients(self) -> None:
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mixed):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.loss = float(loss.detach())

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()

    @property
    def kept(self) -> int:
        """Bytes of parameters, gradients and states."""
        states = [t for s in self.optimizer.state.values() for t in s.values()]
        parameters = list(self.model.parameters())
        grads = [p.grad for p in parameters if p.grad is not None]
        return sum(t.nbytes for t in (*parameters, *grads, *states))


def measure(name: str, side: str, dtype: str) -> dict[str, Any]:
    """Bytes of a step in this process, which should be a fresh one."""
    import torch

    torch.set_num_threads(2)
    Training(name, side, dtype, 64).step()  # imports all that a step imports
    _forget()
    before = _resident()
    training = Training(name, side, dtype)
    for _ in range(STEPS):
        training.step()
    resident = _resident("VmHWM") - before - training.kept
    return {"held": _held(training), "resident": resident, "loss": training.loss}


def _held(training: Training) -> int:
    """The most that forward and backward pass hold at a time, gradients left out."""
    from torch.profiler import ProfilerActivity, profile

    model = training.model
    made: list[tuple[int, int]] = []

    def note(parameter: Any) -> None:
        made.append((time.time_ns(), parameter.grad.nbytes))

    training.optimizer.zero_grad(set_to_none=True)
    hooks = [p.register_post_accumulate_grad_hook(note) for p in model.parameters()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training.gradients()
    for hook in hooks:
        hook.remove()
    events = profiler.profiler.kineto_results.events()
    blocks = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    early = _made_early(training, events, made)
    now = peak = 0
    for _, nbytes in sorted([*blocks, *((at, -nbytes) for at, nbytes in early)]):
        now += nbytes
        peak = max(peak, now)
    return peak


def _made_early(
    training: Training, events: Any, made: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """When each gradient was made: the head's within the loss's op, if that made it."""
    name = "bigops::linear_cross_entropy_with_grad"
    spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == name]
    head = training.model.get_output_embeddings().weight.grad.nbytes
    within = [
        e.start_ns()
        for e in events
        if e.name() == "[memory]"
        and e.nbytes() >= head
        and any(begin <= e.start_ns() <= end for begin, end in spans)
    ]
    return [(within[0], n) if within and n == head else (at, n) for at, n in made]


def _resident(what: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or ("VmHWM") at most."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _forget() -> None:
    """Give free memory back, and begin the count of the most resident memory anew."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--side", choices=SIDES, help="measure in this process, print JSON")
    given = parser.parse_args()
    names, dtypes = given.model or list(MODELS), given.dtype or list(DTYPES)
    if given.side:
        print(json.dumps(measure(names[0], given.side, dtypes[0])))
        return
    columns = f"{'held MB':>9}{'ratio':>7}{'resident MB':>13}{'ratio':>7}"
    print(f"{'model':13}{'dtype':12}{'side':14}{columns}")
    # memory that is freed goes back to the system at once, else its most says little
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in names:
        for dtype in dtypes:
            first: dict[str, Any] = {}
            for side in SIDES:
                command = [sys.executable, "-m", "bigops.benches.step_bytes", "--side", side]
                command += ["--model", name, "--dtype", dtype]
                run = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=environment
                )
                found = json.loads(run.stdout.splitlines()[-1])
                first = first or found
                cells = [
                    f"{found[what] / 1e6:{width}.1f}{found[what] / first[what]:7.2f}"
                    for what, width in (("held", 9), ("resident", 13))
                ]
                print(f"{name:13}{dtype:12}{side:14}{''.join(cells)}  loss {found['loss']:.5f}")


if __name__ == "__main__":
    main()
