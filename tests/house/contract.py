"""What a user of `nn.Linear` does with a layer: each of `CELLS` is done to each of `LAYERS`.

A cell works by numbers or raises by name; what may raise is listed in `MAY_RAISE`, with the reason.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import bigops
from bigops.nn.stored_parameter import StoredParameter
from tests.house.contract_layers import LAYERS, call, dense_of, make, near, x_of
from tests.nn.stored_cases import K, N, bits_of, check_same

# what is done --------------------------------------------------------------------------------


def deepcopied(name: str) -> None:
    layer, x = make(name), x_of()
    assert torch.equal(call(copy.deepcopy(layer), x), call(layer, x))


def pickled(name: str) -> None:
    layer, x = make(name), x_of()
    assert torch.equal(call(pickle.loads(pickle.dumps(layer)), x), call(layer, x))


def torch_saved(name: str) -> None:
    layer, x, file = make(name), x_of(), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(call(torch.load(file, weights_only=False), x), call(layer, x))


def state_dict(name: str) -> None:
    layer, other, x = make(name), LAYERS[name](), x_of()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(call(other, x), call(layer, x))


def functional_call(name: str) -> None:
    layer, x = make(name), x_of()
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(layer, own, (x,)), call(layer, x))
        floating = [n for n, p in layer.named_parameters() if p.is_floating_point()]
        for key in {"bias", "weight"} & set(floating):
            changed = {**own, key: torch.randn_like(own[key])}
            got = torch.func.functional_call(layer, changed, (x,))
            assert not torch.equal(got, call(layer, x)), key


def ddp(name: str) -> None:
    """A step of a rank, beside a layer that is trained; no byte of storage moves."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            first = nn.Linear(K, K)
            model = DistributedDataParallel(nn.Sequential(first, make(name)))
            before = bits_of(model)
            model(x_of()).float().square().mean().backward()
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
            check_same(model, before)
            assert first.weight.grad is not None
        finally:
            dist.destroy_process_group()


def exported(name: str, rows: int, dynamic: bool) -> None:
    layer, x = make(name).eval(), x_of(rows)
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=False)
        near(program.module()(x), traced(layer, x))
        if dynamic:
            more = x_of(9)
            near(program.module()(more), traced(layer, more))


def traced(layer: Any, x: Tensor) -> Tensor:
    """What a graph gives: a layer in recovery has its float path there."""
    if getattr(layer, "frozen", True) or not hasattr(layer, "run_trained"):
        return call(layer, x)
    with torch.no_grad():
        return layer.run_trained(x, None)  # type: ignore[no-any-return]


def compiled(name: str, training: bool) -> None:
    torch._dynamo.reset()
    layer = make(name).train(training)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if not training:
        with torch.no_grad():
            near(run(x_of()), traced(layer, x_of()))
        return
    found = []
    for f in (run, layer):
        x = x_of().requires_grad_()
        y = f(x)
        y.float().square().sum().backward()
        found.append((y, x.grad))
    for got, want in zip(*found, strict=True):
        near(got, want)


def traced_by_fx(name: str) -> None:
    layer, x = make(name).eval(), x_of()
    model = fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    near(call(model, x), traced(layer, x).relu())


def on_meta(name: str) -> None:
    layer, x = make(name), x_of()
    y = layer.to("meta")(x.to("meta"))
    assert y.shape == call(make(name), x).shape
    assert y.device.type == "meta"


def with_fake_tensors(name: str) -> None:
    layer, x = make(name), x_of()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = layer(mode.from_tensor(x))
    assert y.shape == call(layer, x).shape
    assert y.dtype == torch.float32


def vmapped(name: str) -> None:
    layer, x = make(name).eval(), x_of(3, 6)
    with torch.no_grad():
        got = torch.vmap(layer)(x)
    near(got, torch.stack([traced(layer, row) for row in x]))


def jvp(name: str) -> None:
    layer, x, t = make(name).eval(), x_of(), x_of(2, 6)[1]
    _, got = torch.func.jvp(layer, (x,), (t,))
    _, want = torch.func.jvp(dense_of(name, layer), (x.double(),), (t.double(),))
    near(got.double(), want, rounding(name))


def rounding(name: str) -> float:
    """What a layer that rounds x may differ by where an activation reads the product."""
    return 0.05 if "gated" in name or "bf16" in name else 1e-3


def batched_gradients(name: str) -> None:
    layer, x = make(name).eval(), x_of().requires_grad_()
    y = layer(x)
    grads = torch.randn(3, *y.shape)
    (got,) = torch.autograd.grad(y, x, grads, is_grads_batched=True)
    leaf = x.detach().double().requires_grad_()
    out = dense_of(name, layer)(leaf)
    want = torch.stack(
        [torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for g in grads.double()]
    )
    near(got.double(), want, rounding(name))


def autocast(name: str) -> None:
    layer, x = make(name).eval(), x_of()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    if name != "LinearCrossEntropy":
        keeps = name.startswith("packed")  # the dtype of its panels, as documented
        assert got.dtype == (torch.float32 if keeps else torch.bfloat16)
    near(got.float(), call(layer, x), 0.05)


def moved(name: str) -> None:
    layer, x = make(name).eval(), x_of()
    want = call(layer, x)
    layer = layer.to(torch.bfloat16)
    got = call(layer, x.bfloat16())
    if name != "LinearCrossEntropy":
        assert got.dtype == torch.bfloat16
    near(got.float(), want, 0.05)


def channels_last(name: str) -> None:
    layer = make(name).eval()
    want = call(layer, x_of(2, 3, 4))
    model = nn.Sequential(layer).to(memory_format=torch.channels_last)
    strides = [p.stride() for p in make(name).parameters()]
    assert [p.stride() for p in model.parameters()] == strides
    x = x_of(2, 3, 4).to(memory_format=torch.channels_last)
    near(call(model, x), want)


def loaded_from_meta(name: str) -> None:
    layer, x = make(name), x_of()
    with torch.no_grad():
        empty = copy.deepcopy(layer).to("meta")
        empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(call(empty, x), call(layer, x))


def saved_and_loaded(name: str) -> None:
    model, x = nn.Sequential(make(name)).eval(), x_of()
    with tempfile.TemporaryDirectory() as folder:
        bigops.save(model, Path(folder) / "m.safetensors")
        given = nn.Sequential(LAYERS[name]()).eval()
        again = bigops.load(Path(folder) / "m.safetensors", model=given)
    assert torch.equal(call(again, x), call(model, x))


def _learns(model: nn.Module) -> None:
    """Three steps of what is trained lower the loss; storage stays as it is."""
    before = bits_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(x_of()).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    check_same(model, before)


def adapter_on_top(name: str) -> None:
    model = nn.Sequential(make(name))
    x = x_of()
    want = call(model.eval(), x)
    adapter = "more" if "LoRA" in name else "default"
    bigops.add_lora_(model, rank=4, name=adapter)
    near(call(model, x), want, 0.02)  # a fused path may round otherwise
    _learns(model)


def peft_on_top(name: str) -> None:
    import peft

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = make(name)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)  # type: ignore[no-any-return]

    x = x_of()
    want = call(Host().eval(), x)
    for config in (
        peft.LoraConfig(target_modules=["proj"], r=4),
        peft.LoraConfig(target_modules=["proj"], r=4, use_dora=True),
        peft.IA3Config(target_modules=["proj"], feedforward_modules=[]),
    ):
        model = peft.get_peft_model(Host().eval(), config)
        near(call(model, x), want, 0.02)
        _learns(model)
        own: Any = model.base_model.model.proj
        if isinstance(own.get_base_layer().weight, nn.Parameter):
            model.merge_adapter()
            continue
        held = bits_of(model)
        with pytest.raises(RuntimeError, match="weight: expected to be read only"):
            model.merge_adapter()
        check_same(model, held)


def weight_is_read(name: str) -> None:
    layer = make(name).eval()
    assert isinstance(layer, nn.Linear), "no nn.Linear"
    assert layer.weight.shape == (N, K)
    assert layer.weight.dtype == torch.float32
    layer.activation = "none"
    got = F.linear(x_of(), layer.weight, layer.bias)
    if name == "LinearCrossEntropy":
        assert layer.weight is layer._parameters["weight"]
    elif name != "sparse recovery":  # whose Parameter has what the pattern drops
        near(got, call(layer, x_of()), 0.05)


def written_in_place(name: str) -> None:
    """x = proj(x); x += pos, in training, at sizes where torch's own kernel may serve."""
    layer = make(name).train()
    for lead in ((6,), (2, 3), (64, 8)):
        x = x_of(*lead).requires_grad_()
        y = layer(x)
        y += 1
        y.square().mean().backward()
        again = x_of(*lead).requires_grad_()
        (layer(again) + 1).square().mean().backward()
        assert x.grad is not None
        near(x.grad, again.grad)


def default_dtype(name: str) -> None:
    layer, x = make(name).eval(), x_of()
    want = call(layer, x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = call(layer, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


def default_device(name: str) -> None:
    layer, x = make(name).eval(), x_of()
    want = call(layer, x)
    with torch.device("meta"):
        got = call(layer, x)
    assert torch.equal(got, want)


def inference_mode(name: str) -> None:
    layer, x = make(name).eval(), x_of()
    want = call(layer, x)
    with torch.inference_mode():
        assert torch.equal(layer(x), want)
        made = make(name)
        assert torch.equal(made.eval()(x), want)
    y = layer(x_of().requires_grad_())  # the layer is none of inference: it goes on training x
    y.float().sum().backward()


def hooked(name: str) -> None:
    layer, x, seen = make(name).train(), x_of().requires_grad_(), []
    handles = [
        layer.register_forward_pre_hook(lambda m, a: seen.append("before")),
        layer.register_forward_hook(lambda m, a, y: seen.append("after")),
        layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward")),
        layer.register_state_dict_post_hook(lambda *a: seen.append("state")),
    ]
    layer(x).float().sum().backward()
    layer.state_dict()
    assert seen == ["before", "after", "backward", "state"]
    for handle in handles:
        handle.remove()
    call(layer, x)
    assert len(seen) == 4


def offloaded(name: str, to_disk: bool) -> None:
    """accelerate's hooks bring the parameters for a call and take them away."""
    import accelerate

    model, x = nn.Sequential(make(name)).eval(), x_of()
    want = call(model, x)
    with tempfile.TemporaryDirectory() as folder:
        if to_disk:
            accelerate.disk_offload(model, folder, execution_device="cpu")
        else:
            accelerate.cpu_offload(model, execution_device="cpu")
        assert all(p.is_meta for p in model.parameters())
        assert torch.equal(call(model, x), want)
        assert torch.equal(call(model, x), want)
        assert all(p.is_meta for p in model.parameters())
    assert {n for n, p in model.named_parameters() if isinstance(p, StoredParameter)} == {
        f"0.{n}" for n, p in make(name).named_parameters() if isinstance(p, StoredParameter)
    }


QUICK: dict[str, Callable[[str], None]] = {
    "deepcopy": deepcopied,
    "pickle": pickled,
    "torch.save": torch_saved,
    "state_dict": state_dict,
    "functional_call": functional_call,
    "DDP": ddp,
    "fx": traced_by_fx,
    "meta": on_meta,
    "fake tensors": with_fake_tensors,
    "vmap": vmapped,
    "jvp": jvp,
    "batched gradients": batched_gradients,
    "autocast": autocast,
    "to": moved,
    "channels_last": channels_last,
    "load from meta": loaded_from_meta,
    "save and load": saved_and_loaded,
    "weight": weight_is_read,
    "in place": written_in_place,
    "default dtype": default_dtype,
    "default device": default_device,
    "inference mode": inference_mode,
    "hooks": hooked,
}
SLOW: dict[str, Callable[[str], None]] = {
    "export of 1 row": lambda name: exported(name, 1, False),
    "export of n rows": lambda name: exported(name, 6, True),
    "fullgraph in train": lambda name: compiled(name, True),
    "fullgraph in eval": lambda name: compiled(name, False),
    "adapter on top": adapter_on_top,
    "PEFT on top": peft_on_top,
    "offload to the CPU": lambda name: offloaded(name, False),
    "offload to disk": lambda name: offloaded(name, True),
}
CELLS = {**QUICK, **SLOW}

# (layer, cell): what the error says, and why it may be raised.
MAY_RAISE: dict[tuple[str, str], tuple[str, str]] = {
    (gated, cell): (said, "a block of three layers, no nn.Linear")
    for gated in ("GatedMLP", "packed gated")
    for cell, said in (
        ("weight", "no nn.Linear|no attribute 'weight'"),
        ("PEFT on top", "proj"),
    )
}
OWN_KEYS = "accelerate looks in the state_dict for each Parameter by its own name"
for own in ("GatedMLP", "packed", "packed low rank", "packed gated"):
    for place in ("the CPU", "disk"):
        MAY_RAISE[own, f"offload to {place}"] = (r"^'0\.", OWN_KEYS)
MAY_RAISE["LinearCrossEntropy", "adapter on top"] = (
    "may do more than a linear layer",
    "what it answers is a loss",
)
MAY_RAISE["LinearCrossEntropy", "PEFT on top"] = (
    r"Size\(\[\]\)",
    "PEFT adds its product to what the layer answers, which is a loss",
)
for fp8 in ("fp8", "fp8 block"):
    MAY_RAISE[fp8, "pickle"] = ("UntypedStorage", "torch loads no fp8 tensor from a plain pickle")
    MAY_RAISE[fp8, "DDP"] = ("Invalid scalar type", "torch's gloo sends no fp8 at the start")
