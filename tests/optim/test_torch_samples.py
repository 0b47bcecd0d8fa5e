"""Every sample of torch's own database of optimisers: what runs there runs here, to its numbers.

What bigops refuses is listed in REFUSED and nowhere else; what torch refuses raises its class here.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.train import SGD, Adam, AdamW
from tests.support import tolerance
from tests.support.kernels_ran import needs_extension, threads
from tests.support.optimizer_ways import give_gradients, leaves, same

pytestmark = needs_extension

PAIRS: dict[str, tuple[Any, Any]] = {
    "AdamW": (AdamW, torch.optim.AdamW),
    "Adam": (Adam, torch.optim.Adam),
    "SGD": (SGD, torch.optim.SGD),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STEPS = 4
SHAPES = [(30, 40), (90,), ()]

REFUSED = {  # and why; complex parameters and sparse gradients below
    "amsgrad": "the kernels keep no largest second moment",
    "capturable": "the counter of steps lies on the CPU",
    "differentiable": "the kernels have no gradient",
}
FLAGS: list[dict[str, Any]] = [{}]
FLAGS += [{name: value} for name in ("foreach", "fused") for value in (None, False, True)]
FLAGS += [{name: value} for name in ("capturable", "differentiable") for value in (False, True)]
FLAGS_OF = {
    "AdamW": FLAGS,
    "Adam": [*FLAGS, {"decoupled_weight_decay": True, "weight_decay": 0.3}],
    "SGD": [flag for flag in FLAGS if "capturable" not in flag],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    script = Path(__file__).parents[1] / "support" / "torch_samples.py"
    subprocess.run([sys.executable, script, path], check=True)
    return torch.load(path, weights_only=False)  # type: ignore[no-any-return]


def way(
    make: Any, dtype: torch.dtype, options: dict[str, Any], wide: bool = False
) -> tuple[list[Tensor], Any]:
    """Parameters after some steps; wide: in float64, from the same values by the same gradients."""
    params = leaves(dtype, SHAPES)
    if wide:
        params = [p.detach().double().requires_grad_() for p in params]
    optimizer = make(params, **options)
    for step in range(STEPS):
        given = leaves(dtype, SHAPES)
        give_gradients(given, step)
        for p, source in zip(params, given, strict=True):
            p.grad = source.grad.to(p.dtype)  # type: ignore[union-attr]
        optimizer.step()
    return [p.detach() for p in params], optimizer


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_runs_in_torch_runs_here_to_its_numbers(
    name: str, dtype: torch.dtype, samples: dict[str, Any]
) -> None:
    own, theirs = PAIRS[name]
    nearest = {"stochastic_rounding": False}
    for what, options in samples[name]["good"][dtype]:
        if not any(options.get(option) for option in REFUSED):
            got, _ = way(own, dtype, options | nearest)
            plain, _ = way(theirs, dtype, options)
            truth, _ = way(theirs, dtype, options, wide=True)
            reach = STEPS * float(options.get("lr", 1e-3))
            for o, r, p in zip(got, truth, plain, strict=True):
                tolerance.check(o, r, p, r.abs() + reach, what=f"{what}, {dtype}")
        for flag in FLAGS_OF[name]:
            flagged = options | flag
            try:
                held = theirs(leaves(), **flagged)
            except (ValueError, RuntimeError) as error:  # a tensor beside foreach
                with pytest.raises(type(error)):
                    own(leaves(), **flagged)
                continue
            refused = [option for option in REFUSED if flagged.get(option)]
            if refused:
                with pytest.raises(ValueError, match=f"^({'|'.join(refused)}): expected False"):
                    own(leaves(), **flagged)
                continue
            by_flag, ours = way(own, dtype, flagged | nearest)
            if "decoupled_weight_decay" in flag:
                got, _ = way(AdamW, dtype, options | {"weight_decay": 0.3} | nearest)
            assert same(by_flag, got)
            for group, torchs in zip(ours.param_groups, held.param_groups, strict=True):
                assert [k for k in torchs if k not in group] == []
                assert all(same(group[k], torchs[k]) for k in torchs if k != "params")


@pytest.mark.parametrize("name", PAIRS)
def test_what_torch_refuses_raises_its_class(name: str, samples: dict[str, Any]) -> None:
    own, theirs = PAIRS[name]
    classes = {c.__name__: c for c in (TypeError, ValueError, RuntimeError, UserWarning)}
    for what, params, options, kind in samples[name]["bad"]:
        for make in (theirs, own):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    make(leaves() if params is None else copy.copy(params), **options)
                except classes[kind]:
                    continue
            pytest.fail(f"{make}: {what}: no {kind}")


# siblings that the database has not -----------------------------------------------------------


def stepped(make: Any, gradient: Callable[[Tensor], Tensor], **options: Any) -> None:
    params = leaves()[:1]
    optimizer = make(params, **options)
    params[0].grad = gradient(params[0])
    optimizer.step()


def loaded(make: Any, **changes: Any) -> None:
    optimizer = make(leaves())
    state = optimizer.state_dict()
    state["param_groups"][0].update(changes)
    optimizer.load_state_dict(state)


BAD: dict[str, Callable[[Any], Any]] = {
    "fused and foreach": lambda make: make(leaves(), fused=True, foreach=True),
    "fused and differentiable": lambda make: make(leaves(), fused=True, differentiable=True),
    "a rate in words": lambda make: make(leaves(), lr="0.1"),
    "no rate": lambda make: make(leaves(), lr=None),
    "a complex rate": lambda make: make(leaves(), lr=1j),
    "a negative rate as a tensor": lambda make: make(leaves(), lr=torch.tensor(-1.0)),
    "a decay in words": lambda make: make(leaves(), weight_decay="0.1"),
    "a negative decay": lambda make: make(leaves(), weight_decay=-1.0),
    "a name for a parameter": lambda make: make(["weight"]),
    "a dict for parameters": lambda make: make({"weight": leaves()[0]}),
    "no parameters": lambda make: make(iter(())),
    "no leaf": lambda make: make([leaves()[0] * 2]),
    "no dict for a group": lambda make: make(leaves()).add_param_group(leaves()),
    "a group without parameters": lambda make: make(leaves()).add_param_group({"lr": 1.0}),
    "a group in a set": lambda make: make([{"params": set(leaves())}]),
    "a group added in a set": lambda make: make(leaves()).add_param_group(
        {"params": set(leaves())}
    ),
    "a group of names among unnamed ones": lambda make: make(leaves()).add_param_group(
        {"params": [("weight", leaves()[0])]}
    ),
}
BAD_OF = {
    "AdamW": {
        "one beta for two": lambda make: make(leaves(), betas=0.9),
        "no betas": lambda make: make(leaves(), betas=None),
        "a beta past 1": lambda make: make(leaves(), betas=(0.9, 1.5)),
        "betas that are two tensors": lambda make: make(
            leaves(), betas=(torch.ones(2) / 2, torch.ones(2) / 2)
        ),
        "a negative eps": lambda make: make(leaves(), eps=-1.0),
        "a sparse gradient": lambda make: stepped(make, lambda p: torch.ones_like(p).to_sparse()),
    },
    "Adam": {"one beta for two": lambda make: make(leaves(), betas=0.9)},
    "SGD": {
        "a momentum in words": lambda make: make(leaves(), momentum="0.9"),
        "nesterov without momentum": lambda make: make(leaves(), nesterov=True),
        "nesterov with dampening": lambda make: make(
            leaves(), nesterov=True, momentum=0.9, dampening=0.1
        ),
        "a sparse gradient in one kernel": lambda make: stepped(
            make, lambda p: torch.ones_like(p).to_sparse(), fused=True
        ),
    },
}


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name in PAIRS for what in BAD | BAD_OF[name]]
)
def test_other_calls_that_torch_refuses_raise_its_class(name: str, what: str) -> None:
    own, theirs = PAIRS[name]
    call = (BAD | BAD_OF[name])[what]
    with pytest.raises(Exception) as torchs:  # noqa: PT011 - the class is what is looked for
        call(theirs)
    with pytest.raises(torchs.type):
        call(own)


@pytest.mark.parametrize(
    ("name", "option"), [*(("AdamW", option) for option in REFUSED), ("SGD", "differentiable")]
)
def test_what_is_refused_is_refused_by_name_wherever_it_is_asked_for(
    name: str, option: str
) -> None:
    own, _ = PAIRS[name]
    optimizer = own(leaves())
    for ask in (
        lambda: own(leaves(), **{option: True}),
        lambda: own([{"params": leaves(), option: True}]),
        lambda: optimizer.add_param_group({"params": leaves(), option: True}),
        lambda: loaded(own, **{option: True}),
    ):
        with pytest.raises(ValueError, match=f"^{option}: expected False, .*; got True") as error:
            ask()
        assert isinstance(error.value, RuntimeError)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", PAIRS)
def test_complex_parameters_and_sparse_gradients_are_refused(name: str) -> None:
    own, _ = PAIRS[name]
    with pytest.raises(TypeError, match="params: expected dtype .*; got torch.complex64"):
        own([torch.ones(2, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="expected a dense gradient") as error:
        stepped(own, lambda p: torch.ones_like(p).to_sparse())
    assert isinstance(error.value, RuntimeError)
