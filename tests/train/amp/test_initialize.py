"""amp.initialize: what each level makes of models and optimisers, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bigops
from bigops import amp
from bigops.train import SGD, AdamW
from bigops.train.amp.casting import cast

HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 4)
    )


def stepper(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def initialized(opt_level: str, **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = network()
    return amp.initialize(model, stepper(model), opt_level=opt_level, **options)


class Sees(nn.Module):
    """Keeps what its forward was given, and in which dtype a product comes out there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = args, kwargs
        self.product = self.linear(args[0]).dtype if torch.is_tensor(args[0]) else None
        return args, kwargs


# --- the table ---------------------------------------------------------------------------------

# weights, batch norm's weight, running mean without a weight, product in forward, masters, scale
TABLE = {
    "O0": (FULL, FULL, FULL, FULL, False, 1.0),
    "O1": (FULL, FULL, FULL, HALF, False, 2.0**16),
    "O2": (HALF, FULL, HALF, HALF, True, 2.0**16),
    "O3": (HALF, HALF, HALF, HALF, False, 1.0),
    "O4": (FULL, FULL, FULL, BRAIN, False, 1.0),
    "O5": (BRAIN, FULL, BRAIN, BRAIN, True, 1.0),
}


@pytest.mark.parametrize("opt_level", TABLE)
def test_a_row_of_the_table(opt_level: str) -> None:
    weights, norm, bare, product, masters, scale = TABLE[opt_level]
    model, optimizer = initialized(opt_level)
    assert model[0].weight.dtype == model[3].bias.dtype == weights
    assert model[1].weight.dtype == model[1].running_mean.dtype == norm
    assert model[2].running_mean.dtype == bare
    assert model[2].num_batches_tracked.dtype == torch.int64
    params = list(amp.master_params(optimizer))
    if masters:
        assert {p.dtype for p in params} == {FULL}
        for param, master in zip(model.parameters(), params, strict=True):
            assert (param is master) == (param.dtype == FULL)
            assert torch.equal(param.float(), master)  # made of the halved weights
    else:
        assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    assert {v.dtype for v in model.state_dict().values()} == {FULL, torch.int64}
    assert amp.state_dict() == {"loss_scaler0": {"loss_scale": scale, "unskipped": 0}}
    seen = amp.initialize(Sees(), opt_level=opt_level)
    seen(torch.ones(2, 3))
    assert seen.product == product


Point = namedtuple("Point", "x y")


class Batch:
    """A user's own container."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(self.x.to(dtype))


def test_inputs_are_cast_recursively_and_outputs_come_back_in_float32() -> None:
    model = amp.initialize(Sees(), opt_level="O2")
    x, ids, array = torch.ones(2, 3), torch.ones(2, dtype=torch.int64), np.ones(2)
    given = [x, {"a": (x, ids)}, Point(x, "word"), Batch(x), array, np.float64(2), None, 3.0]
    out_args, out_kwargs = model(x.double(), given, key=OrderedDict(b=[x]))
    (first, items), kwargs = model.seen
    assert first.dtype == HALF
    assert items[0].dtype == items[1]["a"][0].dtype == items[2].x.dtype == items[3].x.dtype == HALF
    assert items[1]["a"][1] is ids
    assert items[2].y == "word"
    assert isinstance(items[2], Point)
    assert items[4] is array
    assert items[5] is given[5]
    assert items[6:] == [None, 3.0]
    assert isinstance(kwargs["key"], OrderedDict)
    assert kwargs["key"]["b"][0].dtype == HALF
    assert out_args[1][0].dtype == out_kwargs["key"]["b"][0].dtype == FULL
    assert x.dtype == given[0].dtype == FULL  # the caller's own stay
    other = amp.initialize(Sees(), opt_level="O2", cast_model_outputs=HALF)
    assert other(x)[0][0].dtype == HALF


def test_cast_leaves_modules_and_types_alone() -> None:
    layer = nn.Linear(2, 2)
    assert cast([layer, nn.Linear], HALF) == [layer, nn.Linear]
    assert layer.weight.dtype == FULL
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    assert cast(packed, HALF).data.dtype == HALF


def test_o1_patches_nothing() -> None:
    before = {name: getattr(space, name) for space in (torch, F, Tensor) for name in dir(space)}
    model, _ = initialized("O1")
    after = {name: getattr(space, name) for space in (torch, F, Tensor) for name in dir(space)}
    assert all(before[name] is after[name] for name in ("matmul", "linear", "relu", "__add__"))
    assert before.keys() == after.keys()
    y = model(torch.ones(3, 8))
    assert y.dtype == FULL
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError):
        model(torch.ones(3, 5))
    assert not torch.is_autocast_enabled("cpu")


O1_ON_A_CPU: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "matmul": (lambda x: x.float() @ x, HALF),
    "softmax": (lambda x: x.softmax(-1), HALF),
    "layer_norm": (lambda x: F.layer_norm(x, (4,)), HALF),
    "exp": (torch.exp, HALF),
    "pow": (lambda x: x.pow(2), HALF),
    "sum": (torch.sum, HALF),
    "prod": (torch.prod, FULL),
    "mse_loss": (lambda x: F.mse_loss(x, x), FULL),
    "cross_entropy": (lambda x: F.cross_entropy(x, x), FULL),
    "binary_cross_entropy": (lambda x: F.binary_cross_entropy(x, x), FULL),
}


@pytest.mark.parametrize("name", O1_ON_A_CPU)
def test_where_o1_follows_the_lists_of_torch(name: str) -> None:
    """What the docs say of a half tensor inside of forward."""
    function, dtype = O1_ON_A_CPU[name]

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> str:
            return str(function(x).dtype)

    model = amp.initialize(Calls(), opt_level="O1")
    assert model(torch.full((4, 4), 0.25, dtype=HALF)) == str(dtype)


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("many_models", [False, True])
@pytest.mark.parametrize("many_optimizers", [False, True])
def test_the_return_mirrors_what_was_given(many_models: bool, many_optimizers: bool) -> None:
    model = network()
    optimizer = stepper(model)
    models: Any = [model, network()] if many_models else model
    optimizers: Any = [optimizer, stepper(network())] if many_optimizers else optimizer
    new_models, new_optimizers = amp.initialize(models, optimizers, opt_level="O2")
    assert (new_models, new_optimizers) == (models, optimizers)
    assert isinstance(new_models, list) == many_models
    assert isinstance(new_optimizers, list) == many_optimizers


def test_a_model_alone_comes_back_alone() -> None:
    model = network()
    assert amp.initialize(model, opt_level="O3") is model
    other = [network()]
    assert amp.initialize(other, opt_level="O1") == other


def test_disabled_gives_everything_back_untouched() -> None:
    model = network()
    optimizer = stepper(model)
    attributes = set(vars(model)), set(vars(optimizer))
    assert amp.initialize(model, optimizer, enabled=False, opt_level="O2") == (model, optimizer)
    assert (set(vars(model)), set(vars(optimizer))) == attributes
    assert model[0].weight.dtype == FULL
    loss = model(torch.ones(2, 8)).sum()
    with amp.scale_loss(loss, optimizer) as same:
        assert same is loss
    assert amp.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "norm", "scale"),
    [
        ({"keep_batchnorm_fp32": "False"}, HALF, 2.0**16),
        ({"keep_batchnorm_fp32": "True", "loss_scale": "dynamic"}, FULL, 2.0**16),
        ({"loss_scale": "128.0"}, FULL, 128.0),
        ({"loss_scale": 4, "master_weights": "True"}, FULL, 4.0),
        ({"max_loss_scale": 512.0}, FULL, 512.0),
    ],
)
def test_strings_and_numbers_are_taken(options: Any, norm: torch.dtype, scale: float) -> None:
    model, _ = initialized("O2", **options)
    assert model[1].weight.dtype == norm
    assert amp.state_dict()["loss_scaler0"]["loss_scale"] == scale


def test_o2_without_masters_is_o3_with_a_scale() -> None:
    model, optimizer = initialized("O2", master_weights=False)
    assert all(
        a is b for a, b in zip(model.parameters(), amp.master_params(optimizer), strict=True)
    )


def wrapped() -> nn.Module:
    return nn.DataParallel(network())


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "zero": (lambda: initialized("00"), RuntimeError, "opt_level: expected .* letter O"),
    "O1 masters": (lambda: initialized("O1", master_weights=True), RuntimeError, "master_weights:"),
    "O1 norms": (
        lambda: initialized("O1", keep_batchnorm_fp32="True"),
        RuntimeError,
        "keep_batchnorm_fp32: expected None with O1",
    ),
    "O1 cast": (
        lambda: initialized("O1", cast_model_type=HALF),
        RuntimeError,
        "cast_model_type: expected None with O1",
    ),
    "O2 patches": (
        lambda: initialized("O2", patch_torch_functions=True),
        RuntimeError,
        "patch_torch_functions: expected True for O1 alone",
    ),
    "flag": (
        lambda: initialized("O2", keep_batchnorm_fp32="yes"),
        ValueError,
        "keep_batchnorm_fp32: expected True, False or a string of them; got 'yes'",
    ),
    "scale": (
        lambda: initialized("O2", loss_scale="big"),
        ValueError,
        "loss_scale: expected 'dynamic' or a number above 0; got 'big'",
    ),
    "type": (
        lambda: initialized("O2", cast_model_type=torch.int8),
        ValueError,
        "cast_model_type: expected one of",
    ),
    "scales": (
        lambda: initialized("O2", min_loss_scale=8.0, max_loss_scale=4.0),
        ValueError,
        "expected 0 < min <= max; got 8.0, 4.0",
    ),
    "losses": (lambda: initialized("O2", num_losses=0), ValueError, "num_losses: expected at"),
    "wrapper": (
        lambda: amp.initialize([network(), wrapped()]),
        RuntimeError,
        r"models\[1\]: expected a plain model.* got a DataParallel",
    ),
    "half": (
        lambda: amp.initialize(network().half()),
        RuntimeError,
        r"models\[0\]: expected float32 parameters.* got torch.float16 for 0.weight",
    ),
    "no model": (lambda: amp.initialize(3), TypeError, r"models\[0\]: expected an nn.Module"),
    "no optimizer": (
        lambda: amp.initialize(network(), [3]),
        TypeError,
        r"optimizers\[0\]: expected a torch.optim.Optimizer; got int",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        call()


def test_an_optimizer_is_taken_once_and_a_refusal_changes_nothing() -> None:
    model = network()
    optimizer = stepper(model)
    with pytest.raises(RuntimeError, match=r"optimizers\[1\]: .* got it twice"):
        amp.initialize(model, [optimizer, optimizer], opt_level="O2")
    with pytest.raises(RuntimeError, match="models"):
        amp.initialize([model, network().half()], optimizer, opt_level="O2")
    assert model[0].weight.dtype == FULL
    amp.initialize(model, optimizer, opt_level="O1")
    with pytest.raises(RuntimeError, match=r"optimizers\[0\]: .* got it twice"):
        amp.initialize(network(), optimizer)


# --- copies, states of before, other layers ------------------------------------------------------


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_a_copy_of_the_model_runs_its_own_weights(opt_level: str) -> None:
    """An EMA is a deep copy: in apex its forward ran the weights of the original."""
    model, _ = initialized(opt_level)
    model.eval()
    twin, x = copy.deepcopy(model), torch.ones(2, 8)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        twin[3].bias.fill_(7.0)
    assert not torch.equal(twin(x), model(x))
    assert twin(x).dtype == FULL
    assert bool(twin.state_dict()["3.bias"].eq(7).all())
    pickle.loads(pickle.dumps(stepper(twin)))


def test_a_weight_written_from_outside_is_what_is_saved() -> None:
    model, _ = initialized("O2")
    with torch.no_grad():
        model[3].bias.fill_(0.5)
    assert bool(model.state_dict()["3.bias"].eq(0.5).all())


@pytest.mark.parametrize("opt_level", ["O2", "O3"])
@pytest.mark.parametrize("make", [torch.optim.Adam, AdamW, SGD])
def test_states_of_steps_before_go_on(opt_level: str, make: Any) -> None:
    model = nn.Linear(8, 4)
    optimizer = make(model.parameters(), lr=1e-2, **({"momentum": 0.9} if make is SGD else {}))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    key = "momentum_buffer" if make is SGD else "exp_avg"
    before = optimizer.state[model.weight][key].clone()
    model, optimizer = amp.initialize(model, optimizer, opt_level=opt_level)
    held = optimizer.state[next(amp.master_params(optimizer))][key]
    assert torch.equal(held.float(), before.to(held.dtype).float())
    with amp.scale_loss(model(torch.ones(2, 8)).sum(), optimizer) as loss:
        loss.backward()
    optimizer.step()
    assert bool(model.weight.isfinite().all())


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_a_model_compiles_whole_before_and_after(opt_level: str) -> None:
    x = torch.ones(2, 8)
    model, _ = initialized(opt_level)
    want = model.eval()(x)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), want)
    compiled = amp.initialize(torch.compile(network().eval(), backend="eager"), opt_level=opt_level)
    assert torch.equal(compiled(x), want)


def test_what_a_frozen_layer_stores_is_not_halved() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 8))
    bigops.compress_(model, bigops.Int8(), torch.ones(2, 64), keep="all")
    scale = model[0].state_dict()["scale"].clone()
    amp.initialize(model, opt_level="O2")
    assert torch.equal(model[0].state_dict()["scale"], scale)
    assert model(torch.ones(2, 64)).dtype == FULL


def test_our_layers_under_each_level() -> None:
    for opt_level in TABLE:
        torch.manual_seed(0)
        model: Any = nn.Sequential(bigops.nn.Linear(8, 8, activation="relu"), nn.Linear(8, 2))
        optimizer = SGD(model.parameters(), lr=0.1)
        model, optimizer = amp.initialize(model, optimizer, opt_level=opt_level)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(torch.eye(8)) - 1).square().mean()
            with amp.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], opt_level


# --- functions -----------------------------------------------------------------------------------


def test_functions_of_the_users_own() -> None:
    x, half = torch.ones(2, 2), torch.ones(2, 2, dtype=HALF)

    def dtypes(*args: Tensor, **kwargs: Tensor) -> list[torch.dtype]:
        return [t.dtype for t in (*args, *kwargs.values())]

    wrapped = [amp.half_function, amp.float_function, amp.promote_function]
    plain = [wrap(dtypes)(x, other=half) for wrap in wrapped]
    assert plain == [[FULL, HALF]] * 3
    with torch.autocast("cpu", dtype=HALF):
        cast_ = [wrap(dtypes)(x, other=half) for wrap in wrapped]
    assert cast_ == [[HALF, HALF], [FULL, FULL], [FULL, FULL]]
    with pytest.raises(AttributeError, match="amp.register_half_function: not served.*amp.half_f"):
        amp.register_half_function(F, "linear")
    with pytest.raises(AttributeError, match=r"amp.init: not served.*amp.initialize"):
        amp.init()
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = amp.other
