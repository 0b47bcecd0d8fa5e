"""Runs that are cut at any step go on bit for bit; killed ones lose an interval at most."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from bigops.files import leftovers
from bigops.nn import Linear
from bigops.train import SGD, AdamW, MixedPrecision, Sampler, TrainState
from bigops.train.data import Loader
from tests.accept.conftest import Accept, figures_of

pytestmark = pytest.mark.slow
ROWS, BATCH, STEPS = 72, 10, 200  # 8 batches an epoch, 25 epochs


class Noisy:
    """Rows that draw from every generator."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x = torch.full((16,), row / ROWS) + 0.1 * torch.randn(16)
        return x + float(np.random.rand()), torch.tensor(row % 4 + random.random())


class Model(nn.Module):
    """Large enough for states in 8 bits; dropout draws in the loop, also where it runs twice."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.body = nn.Sequential(Linear(16, 80, activation="gelu"), nn.Dropout(0.1))
        self.middle = nn.Sequential(nn.Linear(80, 80), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(80, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x)
        return self.head(x)


Run = dict[str, Any]


def begin(
    seed: int,
    *,
    optimizer: Callable[..., Any],
    precision: str = "fp32",
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    checkpointed: bool = False,
    model: nn.Module | None = None,
) -> Run:
    """A run that has taken no step. A compiled model is one for all runs, its weights made anew."""
    torch.manual_seed(seed)
    fresh = Model(checkpointed).to(dtype)
    if model is None:
        model = fresh
    else:
        model.load_state_dict({f"_orig_mod.{k}": v for k, v in fresh.state_dict().items()})
        model.zero_grad(set_to_none=True)
    made = optimizer(model.parameters())
    return {
        "model": model,
        "optimizer": made,
        # The scale grows each seventh step: most cuts lie between two of these.
        "precision": MixedPrecision(precision, growth_interval=7, init_scale=2.0**12),
        "schedule": torch.optim.lr_scheduler.OneCycleLR(made, 1e-2, total_steps=STEPS + 1),
        "ema": AveragedModel(fresh, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        "loader": Loader(Noisy(), Sampler(ROWS, BATCH, seed=seed), num_workers=workers),
    }


def go_on(run: Run, step: int, end: int) -> tuple[int, list[float]]:
    """Train up to ``end``; the loss of each step."""
    model, losses = run["model"], []
    dtype = next(model.parameters()).dtype
    while step < end:
        for x, y in run["loader"]:
            with run["precision"].autocast():
                out = model(x.to(dtype)).float()[:, 0]
                loss = (out - y).square().mean() * (1 + 0.1 * random.random())
            run["optimizer"].zero_grad()
            run["precision"].backward(loss)
            if run["precision"].step(run["optimizer"], clip_norm=1.0):
                run["schedule"].step()
                run["ema"].update_parameters(model)
            losses.append(loss.item())
            step += 1
            if step == end:
                break
    return step, losses


def bits(run: Run) -> list[Any]:
    """All that a run holds, and what its generators draw next."""

    def flat(value: Any) -> list[Any]:
        if isinstance(value, Tensor):
            return [value.dtype, value.detach().reshape(-1).contiguous().view(torch.uint8).tolist()]
        if isinstance(value, dict):
            return [item for key, held in value.items() for item in (key, *flat(held))]
        if isinstance(value, list | tuple):
            return [item for held in value for item in flat(held)]
        return [value]

    found = [flat(part.state_dict()) for part in run.values()]
    return [*found, torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]


WAYS: dict[str, dict[str, Any]] = {
    "AdamW, fp16 scaler, 2 workers": {
        "optimizer": lambda p: AdamW(p, lr=1e-2),
        "precision": "fp16-mixed",
        "workers": 2,
    },
    "AdamW in 8 bits, checkpointing": {
        "optimizer": lambda p: AdamW(p, lr=1e-2, eight_bit=True),
        "checkpointed": True,
    },
    "stochastic rounding in 8 bits, 2 workers, checkpointing": {
        "optimizer": lambda p: AdamW(p, lr=1e-2, eight_bit=True, stochastic_rounding=True),
        "dtype": torch.bfloat16,
        "checkpointed": True,
        "workers": 2,
    },
    "SGD, fp16 scaler, checkpointing": {
        "optimizer": lambda p: SGD(p, lr=1e-2, momentum=0.9),
        "precision": "fp16-mixed",
        "checkpointed": True,
    },
    "masters in bf16, SGD": {
        "optimizer": lambda p: SGD(p, lr=1e-2, momentum=0.9, master_weights=True),
        "dtype": torch.bfloat16,
    },
    "AdamW, compiled, fp16 scaler": {
        "optimizer": lambda p: AdamW(p, lr=1e-2),
        "precision": "fp16-mixed",
        "compiled": True,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_cut_run_goes_on_bit_for_bit(way: str, tmp_path: Path, accept: Accept) -> None:
    options = dict(WAYS[way])
    if options.pop("compiled", False):
        torch._dynamo.reset()
        # The rest of what is compiled has the compiler's random numbers and graphs, too.
        backend = "inductor" if accept.share == 1 else "aot_eager"
        options["model"] = torch.compile(Model(False), backend=backend)
    cuts = sorted(random.Random(1).sample(range(1, STEPS), accept.count(40)))
    whole = begin(1, **options)
    state = TrainState(**whole, keep=None)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    step, losses = 0, []
    for cut in cuts:  # one run that is saved on its way, without a break
        step, more = go_on(whole, step, cut)
        losses += more
        state.save(tmp_path, step, background=cut % 2 == 0)
    step, more = go_on(whole, step, STEPS)
    losses += more
    expected = bits(whole)
    state.wait()
    skipped = STEPS - whole["schedule"].last_epoch
    differing = 0
    for cut, file in zip(cuts, sorted(tmp_path.glob("*.safetensors")), strict=True):
        torch.manual_seed(99), np.random.seed(99), random.seed(99)
        again = begin(2, **options)
        assert TrainState(**again).load(file)["step"] == cut
        _, rest = go_on(again, cut, STEPS)
        differing += rest != losses[cut:] or bits(again) != expected
    accept.result(cuts=len(cuts), steps=STEPS, skipped=skipped, differing=differing)
    assert differing == 0


def test_what_is_left_out_of_a_state_is_seen(tmp_path: Path) -> None:
    """The comparison has eyes: a state without one part goes on otherwise."""
    options = WAYS["AdamW, fp16 scaler, 2 workers"] | {"workers": 0}
    whole = begin(1, **options)
    go_on(whole, 0, 11)
    TrainState(**whole).save(tmp_path, 11)
    _, losses = go_on(whole, 11, 30)
    expected = bits(whole)
    for left_out in ("", *whole):
        again = begin(2, **options)
        TrainState(**{k: v for k, v in again.items() if k != left_out}).load(tmp_path)
        _, rest = go_on(again, 11, 30)
        assert (rest == losses and bits(again) == expected) is (left_out == ""), left_out


# --- kill -9 --------------------------------------------------------------------------------


def killed(folder: str, kills: int) -> None:
    """Print what became of runs that were killed, half of them while they saved.

    They are forked: each would import torch for seconds otherwise. One thread, so that nothing is
    lost in a fork.
    """
    torch.set_num_threads(1)
    rng, interval = random.Random(0), 3
    seen: dict[str, int] = {"kills": kills, "amid_a_save": 0, "corrupt": 0, "lost_more": 0}

    def parts() -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
        return {"model": model, "sampler": Sampler(1000, 1)}

    def whole(own: dict[str, Any], step: int) -> bool:
        """Whether the parts of a file are of one step."""
        filled = all(bool((p == step).all()) for p in own["model"].parameters())
        return filled and own["sampler"].samples_seen == step % 1000

    run, reached = Path(folder) / "run", Path(folder) / "reached"
    for kill in range(kills):
        amid, background = kill % 2 == 0, kill % 4 > 1
        child = os.fork()
        if child == 0:
            try:
                own = parts()
                state = TrainState(keep=2, **own)
                step = state.load(run, required=False).get("step", 0)
                while True:
                    step += 1
                    with torch.no_grad():
                        for p in own["model"].parameters():
                            p.fill_(step)
                    own["sampler"].samples_seen = step % 1000
                    reached.write_text(str(step))
                    if step % interval == 0:
                        state.save(run, step, background=background)
                    time.sleep(0.003)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.05, 0.15))
        deadline = time.monotonic() + 5
        while amid and not leftovers(run, "state-") and time.monotonic() < deadline:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen["amid_a_save"] += bool(leftovers(run, "state-"))
        if TrainState.latest(run) is None:
            seen["lost_more"] += int(reached.read_text() or 0) > 2 * interval
            continue
        own = parts()
        try:
            step = TrainState(**own).load(run)["step"]
        except ValueError:
            seen["corrupt"] += 1
            continue
        seen["corrupt"] += not whole(own, step)
        # In the background another interval goes by while a save is under way.
        lost = int(reached.read_text() or step) - step
        seen["lost_more"] += lost > (2 if background else 1) * interval
    names = [file.name for file in run.iterdir() if re.fullmatch(r"\d+-step-\d+.*", file.name)]
    seen["files"] = len(names)
    print(json.dumps(seen))


def test_a_killed_run_loses_an_interval_at_most(tmp_path: Path, accept: Accept) -> None:
    kills = accept.count(100)
    code = f"from tests.accept.test_resume import killed; killed({str(tmp_path)!r}, {kills})"
    figures = figures_of(code)
    accept.result(**figures)
    assert figures["corrupt"] == 0
    assert figures["lost_more"] == 0
    assert (
        figures["files"] <= 3
    )  # two, and a third where the kill fell between writing and removing
    assert figures["amid_a_save"] >= kills // 2
