"""Storage as parameters that never train: under each host of parameters, of each kind of layer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import bigops
from bigops.compress.store import read_header
from bigops.nn.stored_parameter import StoredParameter
from bigops.train import AdamW
from tests.nn import stored_cases
from tests.nn.stored_cases import (
    LAYERS,
    between,
    bits_of,
    blank,
    check_same,
    check_twin,
    is_packed,
    rows,
    stored_of,
)
from tests.support.ranks import run_ranks

every_layer = pytest.mark.parametrize("kind", LAYERS)


# --- what it is ---------------------------------------------------------------------------------


@every_layer
def test_all_storage_is_listed_with_the_parameters(kind: str) -> None:
    layer = LAYERS[kind]()
    stored = stored_of(layer)
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} <= {"bias", "values"}
    assert {n for n, _ in layer.named_parameters()} == {*stored, *trained}
    # what is left with the buffers is the qparams of x where the format does not hold it
    assert [n for n, _ in layer.named_buffers()] == (
        ["x_qparams"] if kind == "sparse static" else []
    )
    if not is_packed(kind):
        assert {*stored, *trained, *dict(layer.named_buffers())} == set(layer.state_dict())
    else:
        assert not {n for n in layer.state_dict() if "panels" in n}
        assert {n.rpartition(".")[2] for n in layer.state_dict()} <= {"weight", "u", "v", "bias"}


@every_layer
def test_nothing_asks_the_storage_to_train(kind: str) -> None:
    model = between(kind)
    kept = bits_of(model)
    model.requires_grad_(True)
    for p in model.parameters():
        p.requires_grad = True
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(kept)
    for make in (torch.optim.AdamW, torch.optim.SGD, AdamW):
        optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        loss = model(rows()).square().mean()
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
        scaler.step(optimizer)
        scaler.update()
        after = [p for p in model.parameters() if p.requires_grad]
        assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert all(p.grad is None for p in stored_of(model).values())
        check_same(model, kept)
        assert not any(isinstance(p, StoredParameter) for p in optimizer.state)


def test_other_parameters_are_made_of_it() -> None:
    """What hosts do to move or copy a Parameter."""
    p = LAYERS["int8"]().values
    for made in (nn.Parameter(p), nn.Parameter(p, requires_grad=False), type(p)(p, True)):
        assert type(made) is StoredParameter
        assert not made.requires_grad
        assert made.data_ptr() == p.data_ptr()
    assert type(p.data) is Tensor
    assert isinstance(p, nn.Parameter)
    with torch.device("meta"):
        assert p.to("meta").is_meta


# --- what it outlives ---------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)  # by pickle; alone that takes no float8 of torch 2.13
    file.seek(0)
    made = torch.load(file, weights_only=False)
    if not any(p.dtype == torch.float8_e4m3fn for p in model.parameters()):
        check_twin(made, pickle.loads(pickle.dumps(model)))
    return made  # type: ignore[no-any-return]


def _plainly_replaced(model: nn.Module) -> nn.Module:
    """What hooks of offloading libraries do, until the model is moved."""
    kept = bits_of(model)
    for module in model.modules():
        for name, p in module._parameters.items():
            if isinstance(p, StoredParameter):
                module._parameters[name] = nn.Parameter(p.data.clone(), requires_grad=False)
    plain = {n: p for n, p in model.named_parameters() if n in kept}
    assert {type(p) for p in plain.values()} == {nn.Parameter}
    model(rows()).sum().backward()
    model.zero_grad()
    return model.to("cpu")


def _set(model: nn.Module) -> nn.Module:
    """What FSDP2 does where a module has a ``__setattr__`` of its own."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if isinstance(p, StoredParameter):
                setattr(module, name, nn.Parameter(p.data.clone(), requires_grad=False))
                setattr(module, name, p.data.clone())
    return model


def _swapped(model: nn.Module) -> nn.Module:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _loaded(assign: bool) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        twin = blank(copy.deepcopy(model))
        state = {n: t.clone() for n, t in model.state_dict().items()}
        twin.load_state_dict(state, assign=assign)
        return twin

    return load


def _from_meta(model: nn.Module) -> nn.Module:
    """Moved to meta, made empty again and filled."""
    twin = copy.deepcopy(model).to("meta")
    assert all(p.is_meta for p in twin.parameters())
    assert set(stored_of(twin)) == set(stored_of(model))
    twin.to_empty(device="cpu")
    assert set(stored_of(twin)) == set(stored_of(model))
    twin.load_state_dict(model.state_dict())
    return twin


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "a plain Parameter in its place": _plainly_replaced,
    "set as an attribute": _set,
    "to float64 and back": lambda m: m.double().float(),
    "swapped": _swapped,
    "load_state_dict": _loaded(False),
    "load_state_dict, assign": _loaded(True),
    "meta": _from_meta,
    "share_memory": lambda m: m.share_memory(),
    "AveragedModel": lambda m: AveragedModel(m).module,
}


@pytest.mark.parametrize("way", WAYS)
@every_layer
def test_the_class_and_the_bits_outlive(kind: str, way: str) -> None:
    if is_packed(kind) and way in ("to float64 and back", "swapped"):
        pytest.skip("panels follow the dtype of the matrix, and no packed kernel takes float64")
    model = between(kind)
    check_twin(between(kind), WAYS[way](model))


@pytest.mark.parametrize("kind", ["packed", "packed low rank", "packed gated"])
def test_panels_follow_the_dtype_of_their_matrix(kind: str) -> None:
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model = between(kind).bfloat16()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert set(stored_of(model)) == set(stored_of(between(kind)))


@every_layer
def test_averages_leave_the_storage_as_it_is(kind: str) -> None:
    model = between(kind)
    if kind.startswith("fp8"):
        averaged = AveragedModel(model)
        averaged.update_parameters(model)
        with pytest.raises(NotImplementedError, match="Float8_e4m3fn"):  # of torch 2.13
            averaged.update_parameters(model)
        return
    for given in (
        {},
        {"avg_fn": get_ema_avg_fn(0.9999)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9999)},
    ):
        averaged = AveragedModel(model, **given)
        for _ in range(3):
            averaged.update_parameters(model)
        for name, p in stored_of(averaged.module).items():
            if not p.is_floating_point():
                assert torch.equal(p, dict(model.named_parameters())[name]), name
        torch.testing.assert_close(averaged(rows()), model(rows()))


def test_a_deep_copy_shares_memory_where_the_original_does() -> None:
    whole = torch.arange(8)
    one, two = StoredParameter(whole[:4]), StoredParameter(whole[4:])
    first, second, again = copy.deepcopy([one, two, one])
    assert first is again
    assert type(first) is StoredParameter
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


# --- files ----------------------------------------------------------------------------------------


@every_layer
def test_a_state_dict_has_plain_tensors_and_goes_through_files(kind: str, tmp_path: Path) -> None:
    model = between(kind)
    state = model.state_dict()
    assert {type(t) for t in state.values()} == {Tensor}
    torch.save(state, tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert {type(t) for t in loaded.values()} == {Tensor}
    torch.save(model.state_dict(keep_vars=True), tmp_path / "vars.pt")
    kept = torch.load(tmp_path / "vars.pt", weights_only=True)
    assert not any(isinstance(t, StoredParameter) for t in kept.values())
    for given in (loaded, kept):
        twin = _loaded(False)(model)
        twin.load_state_dict(given)
        check_twin(model, twin)
    save_model(model, str(tmp_path / "m.safetensors"))
    twin = blank(copy.deepcopy(model))
    load_model(twin, str(tmp_path / "m.safetensors"))
    check_twin(model, twin)
    bigops.save(model, tmp_path / "m.bigops")
    check_twin(model, bigops.load(tmp_path / "m.bigops").train())


def test_the_file_says_of_no_storage_that_it_is_fixed(tmp_path: Path) -> None:
    """It is so by itself, and older versions of the package knew no such parameter."""
    model = between("thawed")
    model[1].values.requires_grad_(False)
    bigops.save(model, tmp_path / "m")
    assert read_header(tmp_path / "m").fixed == ["1.values"]


# --- torch.compile, export, functions of parameters -----------------------------------------------


@every_layer
def test_compile_takes_it_as_a_plain_parameter(kind: str) -> None:
    model, x = between(kind), rows()
    expected = model(x)
    expected.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], grads)
    assert all(p.grad is None for p in stored_of(model).values())


@every_layer
def test_an_exported_program_has_it_among_its_parameters(kind: str) -> None:
    model, x = between(kind).eval(), rows()
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert not set(stored_of(model)) & set(program.graph_signature.buffers)
        assert set(stored_of(model)) & set(program.graph_signature.parameters)
        torch.testing.assert_close(program.module()(x), model(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), model(x))


@every_layer
def test_functions_of_parameters(kind: str) -> None:
    model, x = between(kind), rows()
    expected = model(x)
    call = torch.func.functional_call
    assert torch.equal(call(model, dict(model.named_parameters()), (x,)), expected)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.func.grad(lambda p: call(model, p, (x,)).sum())(trained)
    expected.sum().backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad)
    assert set(stored_of(model)) == set(bits_of(between(kind)))  # put back as they were
    parameters, buffers = torch.func.stack_module_state([model, model])
    stacked = torch.func.vmap(lambda p, b: call(model, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(stacked[1], expected)


# --- torch.distributed ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ddp_fsdp2_and_distributed_checkpoints(size: int, tmp_path: Path) -> None:
    """DDP sends no compressed byte in a step, FSDP2 shards storage and trains the rest."""
    run_ranks(stored_cases.__file__, str(tmp_path), size=size)
