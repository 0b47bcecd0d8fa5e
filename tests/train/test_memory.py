"""checkpoint_: the same gradients, bit by bit, of less memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigops.benches import memory
from bigops.nn import Linear, LinearCrossEntropy
from bigops.train import checkpoint_
from tests.support.kernels_ran import needs_extension

pytestmark = needs_extension
D, BLOCKS = 32, 4


class Block(nn.Module):
    """A gated layer with norm and dropout."""

    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(d), nn.Dropout(0.3)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = LinearCrossEntropy(D, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x, ids)  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


IDS = torch.arange(128).reshape(4, 32) % 50


def gradients(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    """Of one step, and the loss; the random state afterwards."""
    torch.manual_seed(5)
    model.zero_grad()
    loss = call()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *grads, torch.get_rng_state()]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("policy", ["full", "selective", "masks", "budget"])
@pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
def test_bits_of_a_step(model: Model, fused: bool, autocast: bool, policy: str) -> None:
    if fused:
        for block in model.blocks:
            block.up = Linear.from_linear(block.up, activation="relu2")
            block.down = Linear.from_linear(block.down)

    def call() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(IDS)  # type: ignore[no-any-return]

    want, keys = gradients(model, call), list(model.state_dict())
    saved = [checkpoint_(model, word, IDS).saved_after for word in ("none", "full")]
    of_budget = sum(saved) // 2  # type: ignore[arg-type]
    report = checkpoint_(model, of_budget if policy == "budget" else policy, IDS)
    assert list(model.state_dict()) == keys
    assert report.found == BLOCKS
    assert report.saved_after < report.saved_before  # type: ignore[operator]
    assert report.peak_after < report.peak_before  # type: ignore[operator]
    chosen = [model.get_submodule(path) for path in report.blocks]
    calls: list[nn.Module] = []
    for block in chosen:
        block.norm.register_forward_hook(lambda norm, *_: calls.append(norm))  # type: ignore[union-attr]
    assert same(gradients(model, call), want)
    assert len(calls) == (1 if policy == "masks" else 2) * len(chosen)
    checkpoint_(model, "none")
    assert same(gradients(model, call), want)


def test_what_is_kept_and_reported(model: Model) -> None:
    """The report against torch's profiler, which counts each block of the allocator."""

    def step() -> None:
        torch.autograd.grad(model(IDS), list(model.parameters()))

    reports = {}
    for policy in ("none", "selective", "full", "masks"):
        report = checkpoint_(model, policy, IDS)
        use = memory.measure(lambda: model(IDS))
        # no operator gives the random states that torch keeps for each block's second run
        states = len(report.blocks) * torch.get_rng_state().nbytes
        kept = use.kept - (states if policy in ("selective", "full") else 0)
        assert abs(kept - report.saved_after) <= 0.01 * kept, policy  # type: ignore[operator]
        peak = memory.measure(step).peak
        assert abs(peak - report.peak_after) <= 0.15 * peak, policy  # type: ignore[operator]
        reports[policy] = report
    full, selective, none = (reports[p].saved_after for p in ("full", "selective", "none"))
    assert full < selective < none  # type: ignore[operator]
    # beside its input a block keeps the input and the result of gelu, 4 D wide each
    assert none - full > BLOCKS * IDS.numel() * 8 * D * 4  # type: ignore[operator]
    # three of four bytes of a mask, and one number is kept beside it
    in_bytes = none - reports["masks"].saved_after  # type: ignore[operator]
    assert in_bytes == BLOCKS * (IDS.numel() * D * 3 - 4)
    assert len(reports["full"].blocks) == BLOCKS
    assert reports["none"].blocks == []
    assert checkpoint_(model, "full").saved_before is None


def test_a_budget_takes_as_few_blocks_as_it_needs(model: Model) -> None:
    whole = checkpoint_(model, "none", IDS).saved_before
    least = checkpoint_(model, "full", IDS).saved_after
    assert whole is not None
    assert least is not None
    counts = []
    for budget in (whole, (3 * whole + least) // 4, (whole + least) // 2, least):
        report = checkpoint_(model, budget, IDS)
        assert report.saved_before == whole
        assert report.saved_after <= budget  # type: ignore[operator]
        on = [f"blocks.{i}" for i, block in enumerate(model.blocks) if "forward" in vars(block)]
        counts.append(len(on))
    assert counts == [0, 1, 2, 4]
    before = [vars(block).get("forward") for block in model.blocks]
    with pytest.raises(
        ValueError, match=rf"policy: expected at least {least} bytes.*got {least - 1}"
    ):
        checkpoint_(model, least - 1, IDS)
    assert [vars(block).get("forward") for block in model.blocks] == before


def test_measuring_leaves_no_trace(model: Model) -> None:
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    least = checkpoint_(model, "full", IDS).saved_after
    assert least is not None
    checkpoint_(model, least + 1, IDS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_blocks_that_are_named(model: Model) -> None:
    report = checkpoint_(model, "full", blocks=["blocks.1", model.blocks[2].down])
    assert report.blocks == ["blocks.1", "blocks.2.down"]
    assert report.found == 2
    pairs = nn.Sequential(
        nn.Sequential(Block(), Block()), nn.Sequential(nn.Linear(D, D), nn.ReLU())
    )
    assert checkpoint_(pairs, "full").blocks == ["0", "1"]  # of one class, and outermost
    stages = nn.ModuleDict({"a": nn.Sequential(Block(), Block()), "b": nn.ModuleList([Block()])})
    assert checkpoint_(stages, "full").blocks == ["a.0", "a.1"]


def test_copies_compiled_and_without_gradients(model: Model) -> None:
    model.eval()
    want = gradients(model, lambda: model(IDS))
    for policy in ("full", "selective"):
        checkpoint_(model, policy)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.blocks[0].forward.module is other.blocks[0]
            assert same(gradients(other, lambda other=other: other(IDS)), want)
        with torch.no_grad():
            assert torch.equal(model(IDS), want[0])
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for got, right in zip(gradients(model, lambda: compiled(IDS)), want, strict=True):  # noqa: B023
            torch.testing.assert_close(got, right)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_models_of_transformers(name: str) -> None:
    """Their caches of keys and values are not extended a second time."""
    from tests.train.test_chunked_loss import build, inputs_of

    pytest.importorskip("transformers")
    model: Any = build(name)
    inputs, blocks = inputs_of(name), {"llama": 1, "gpt2": 1, "t5": 2}[name]
    found = [
        p for p, m in model.named_modules() if p.endswith((".0", "block.0")) and p.count(".") < 4
    ]
    want = gradients(model, lambda: model(**inputs).loss)
    for policy in ("full", "selective"):
        chosen = [p for p in found if p in dict(model.named_modules())][:blocks]
        checkpoint_(model, policy, inputs, blocks=chosen)
        assert same(gradients(model, lambda: model(**inputs).loss), want)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="model: expected no checkpointing of its own"):
        checkpoint_(model, "full", blocks=chosen)


def test_masks_are_told_from_the_rest() -> None:
    from bigops.train.saved_masks import _Mask, _pack, _unpack

    drawn = torch.empty(100, 50).bernoulli_(0.9)
    last = drawn.clone() / 0.9
    last[-1, -1] = 3
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        mask = drawn.to(dtype) / 0.9
        assert isinstance(_pack(mask), _Mask)
        assert torch.equal(_unpack(_pack(mask)), mask)
    others = (last, -drawn, drawn * 0, drawn[:9], drawn.t(), drawn * float("nan"), drawn.bool())
    for other in (*others, drawn.clone().requires_grad_(), torch.rand(100, 50)):
        assert not isinstance(_pack(other), _Mask)
        assert _unpack(_pack(other)) is other
    x = torch.rand(100, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        y = x.exp()
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"policy": "half"},
        ValueError,
        "policy: expected one of full, selective, masks, none",
    ),
    ({"policy": 1.5}, TypeError, "policy: expected a word or a whole number of bytes; got float"),
    ({"policy": True}, TypeError, "policy: expected a word or a whole number of bytes; got bool"),
    ({"policy": -1}, ValueError, "policy: expected at least 0 bytes; got -1"),
    ({"policy": 10}, ValueError, "example_inputs: expected inputs to measure on"),
    ({"blocks": ["blocks.9"]}, ValueError, "blocks: expected modules of the model.*got blocks.9"),
    ({"blocks": [nn.Linear(2, 2)]}, ValueError, "blocks: expected modules of the model.*got Lin"),
    ({"blocks": ["blocks.1", "blocks.1.up"]}, ValueError, "blocks.1.up is within blocks.1"),
    ({"model": nn.Linear(2, 2)}, ValueError, "the model has no list of modules of one class"),
    ({"model": 3}, TypeError, "model: expected a torch.nn.Module; got int"),
]


@pytest.mark.parametrize(("other", "kind", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_wrong_arguments(
    model: Model, other: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        checkpoint_(**{"model": model, **other})
    assert not any("forward" in vars(block) for block in model.blocks)


def test_a_block_with_a_forward_of_its_own(model: Model) -> None:
    model.blocks[1].forward = own = lambda x, scale: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="blocks.1 has its own"):
        checkpoint_(model, "full")
    assert model.blocks[1].forward is own
    assert "forward" not in vars(model.blocks[0])


def test_a_step_with_other_noise_is_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the second run draws other numbers for its dropout."""
    from bigops.train import memory as verb

    true = verb.checkpoint
    want = gradients(model, lambda: model(IDS))
    careless = lambda *a, **k: true(*a, preserve_rng_state=False, **k)  # noqa: E731
    monkeypatch.setattr(verb, "checkpoint", careless)
    checkpoint_(model, "full")
    assert not same(gradients(model, lambda: model(IDS)), want)
