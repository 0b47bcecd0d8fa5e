"""What each verb does to one tiny model: right, left, refused by name, or wrong.

A cell is ``right`` (numbers as those of the reference), ``left`` (nothing taken, each reason in the
record), ``refused: ..`` (an exception of bigops), ``no: ..`` (the model itself cannot do it),
``wrong: ..`` (other numbers than those of the reference) or ``foreign: ..`` (any other exception).
"""

from __future__ import annotations

import copy
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import bigops
from bigops.graph.record import Record
from tests.accept.census import twin
from tests.accept.census.tiny import Tiny, outputs
from tests.accept.census.twin import WrongError

EPS = torch.finfo(torch.float32).eps
_HOME = os.path.dirname(bigops.__file__)


class Left(Exception):
    """Nothing was taken; the record says why."""


class No(Exception):
    """The plain model cannot do it."""


def census(tiny: Tiny) -> dict[str, Any]:
    """One line: how the model was made small, and the outcome of each verb."""
    linears = [m for m in tiny.model.modules() if isinstance(m, nn.Linear)]
    line: dict[str, Any] = {"built": tiny.tier, "linears": len(linears)}
    plain = Plain(tiny)
    for verb, call in VERBS.items():
        taken: dict[str, int] = {}
        line[verb] = _outcome(lambda c=call, t=taken: c(tiny, plain, t))
        if "layers" in taken:
            line[f"{verb} layers"] = taken["layers"]
    return line


def _outcome(call: Callable[[], None]) -> str:
    try:
        call()
    except Left:
        return "left"
    except No as error:
        return f"no: {error}"
    except WrongError as error:
        return f"wrong: {error}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = frames[-1].filename.startswith(_HOME) and isinstance(
            error, ValueError | TypeError | RuntimeError | NotImplementedError
        )
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        where = "" if ours else f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"
        return f"{'refused' if ours else 'foreign'}: {text}{where}"
    return "right"


Numbers: TypeAlias = tuple[list[Tensor], dict[str, Tensor]]  # outputs, gradients by name


class Plain:
    """The plain model's numbers: outputs and gradients in float32 and, where it runs, float64."""

    def __init__(self, tiny: Tiny) -> None:
        model = copy.deepcopy(tiny.model)  # a call may leave a state that has no deep copy
        self.outputs, self.gradients = gradients(model, tiny.inputs)
        again, _ = gradients(copy.deepcopy(tiny.model), tiny.inputs)
        self.same = _equal(self.outputs, again)
        sizes = [float(g.abs().nan_to_num().max()) for g in self.gradients.values()]
        self.largest = max(sizes, default=0.0)  # entry of any gradient
        self.exact = _in_float64(tiny)
        self.others = [self.exact] if self.exact else [_nudged(tiny, seed) for seed in range(3)]

    def hold(self, what: str, got: Tensor) -> None:
        """At most 8 times plain torch's own error, and 1e-5 of the largest entry.

        The own error is that against float64; where the model does not run in it, what half a unit
        in the last place of each weight does to the numbers. For gradients, sums that may cancel, 4
        eps of the largest entry of any gradient besides.
        """
        plain, others = self._find(what, (self.outputs, self.gradients)), self.others
        if got.shape != plain.shape:
            raise WrongError(f"{what}: shape {list(got.shape)}, plain {list(plain.shape)}")
        finite = plain.isfinite()
        if not torch.equal(got.isfinite(), finite):
            raise WrongError(f"{what}: other entries are finite than those of plain torch")
        if not finite.any():
            return
        own = max(float((plain - self._find(what, o)).abs()[finite].max()) for o in others)
        reference = self._find(what, self.exact or (self.outputs, self.gradients))[finite].double()
        error = (got[finite].double() - reference).abs().max()
        scale = 0.0 if what.startswith("output ") else self.largest
        allowed = 8 * own + 1e-5 * reference.abs().max() + 4 * EPS * scale + 1e-30
        if not bool(error <= allowed):
            raise WrongError(f"{what}: error {error:.3g}, allowed {allowed:.3g}")

    @staticmethod
    def _find(what: str, numbers: Numbers) -> Tensor:
        outputs, grads = numbers
        kind, _, name = what.partition(" ")
        return outputs[int(name)] if kind == "output" else grads[name]


def _in_float64(tiny: Tiny) -> Numbers | None:
    """The numbers of the model in float64; None where it names another dtype somewhere."""
    try:
        wide = copy.deepcopy(tiny.model).double()
        inputs = {n: t.double() if t.is_floating_point() else t for n, t in tiny.inputs.items()}
        found = gradients(wide, inputs)
    except Exception:
        return None
    numbers = [*found[0], *found[1].values()]
    fits = all(t.dtype == torch.float64 and bool(t.isfinite().all()) for t in numbers)
    return found if fits else None


def _nudged(tiny: Tiny, seed: int) -> Numbers:
    """The numbers of the model whose weights are off by up to half a unit in the last place."""
    model = copy.deepcopy(tiny.model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.mul_(1 + (torch.rand_like(p) - 0.5) * EPS)
    return gradients(model, tiny.inputs)


def gradients(model: nn.Module, inputs: dict[str, Any]) -> Numbers:
    """Outputs, and the gradients of a fixed sum of them for each parameter that has one."""
    found = outputs(model, inputs)
    wanted = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    loss = _loss(found)
    if not loss.requires_grad:
        return [t.detach() for t in found], {}
    grads = torch.autograd.grad(loss, [p for _, p in wanted], allow_unused=True)
    named = {n: g for (n, _), g in zip(wanted, grads, strict=True) if g is not None and g.numel()}
    return [t.detach() for t in found], named


def _loss(found: list[Tensor]) -> Tensor:
    total = found[0].new_zeros(())
    for i, t in enumerate(found):
        generator = torch.Generator().manual_seed(i)
        total = total + (t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum()
    return total


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- the verbs ------------------------------------------------------------------------------


def fused(tiny: Tiny, plain: Plain, taken: dict[str, int]) -> None:
    """`fuse_`: outputs and gradients of each parameter."""
    model = copy.deepcopy(tiny.model)
    record = bigops.fuse_(model)
    _account(model, record, taken)
    if not plain.same:
        raise No("two plain calls differ")
    got, grads = gradients(model, tiny.inputs)
    if len(got) != len(plain.outputs):
        raise WrongError(f"{len(got)} outputs, plain {len(plain.outputs)}")
    for i, output in enumerate(got):
        plain.hold(f"output {i}", output)
    if grads.keys() != plain.gradients.keys():
        raise WrongError("other parameters have gradients")
    for name, grad in grads.items():
        if not plain.gradients[name].abs().max() <= 1e-5 * plain.largest:  # which is rounding alone
            plain.hold(f"gradient {name}", grad)


def _account(model: nn.Module, record: Record, taken: dict[str, int]) -> None:
    taken["layers"] = len(record.done)
    named = {entry.name for entry in (*record.done, *record.skipped)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in named:
            raise WrongError(f"{path}: no word of it in the record")
    if abs(sum(record.shares().values()) - 1) > 1e-9 and record.model_bytes:
        raise WrongError(f"the record's shares sum to {sum(record.shares().values())}")
    if not record.done:
        raise Left


def compressed(config: Any) -> Callable[..., None]:
    """`compress_`: each layer against its dequantised weight, the whole against the reference."""

    def verb(tiny: Tiny, plain: Plain, taken: dict[str, int]) -> None:
        model = copy.deepcopy(tiny.model)
        record = bigops.compress_(model, config, keep="all")
        _account(model, record, taken)
        exact = twin.dequantised(model)
        twin.hold_layers(model, exact, tiny.inputs)
        if not plain.same:
            raise No("each layer is right, and two plain calls differ")
        twin.hold_model(model, exact, tiny.inputs)

    return verb


def smoothed(tiny: Tiny, plain: Plain, taken: dict[str, int]) -> None:
    """`smooth_` of all that can be scaled: equal outputs to the bit, hidden states too.

    It is no cell of the file, which was made before.
    """
    model = copy.deepcopy(tiny.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1 and p.is_floating_point():
                p.mul_(torch.where(torch.rand_like(p) < 0.1, 50.0, 1.0))
    calls = [tiny.inputs]
    with torch.no_grad():
        try:
            states = {**tiny.inputs, "output_hidden_states": True}
            outputs(model, states)
            calls.append(states)
        except Exception:  # an argument that not all models have
            pass
        before = [outputs(model, inputs) for inputs in calls]
        record = bigops.smooth_(model, [tiny.inputs], least=1)
        _account(model, record, taken)
        if not plain.same:
            raise No("two plain calls differ")
        for inputs, expected in zip(calls, before, strict=True):
            if not _equal(outputs(model, inputs), expected):
                raise WrongError("the smoothed model gives other bits")


def saved(tiny: Tiny, plain: Plain, taken: dict[str, int]) -> None:
    """`save` and `load(model=)` of an int8 model: equal outputs to the bit."""
    model = _int8(tiny)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = os.path.join(folder, "m.safetensors")
        bigops.save(model, path)
        fresh = bigops.load(path, model=tiny.other())
        if not plain.same:
            raise No("two plain calls differ")
        if not _equal(outputs(model, tiny.inputs), outputs(fresh, tiny.inputs)):
            raise WrongError("the loaded model gives other bits")


def _int8(tiny: Tiny) -> nn.Module:
    model = copy.deepcopy(tiny.model)
    if not bigops.compress_(model, bigops.Int8(), keep="all").done:
        raise Left
    return model


def generated(tiny: Tiny, plain: Plain, taken: dict[str, int]) -> None:
    """Greedy `generate`: the fused model's tokens are the plain one's; the int8 model's as many."""
    can = getattr(tiny.model, "can_generate", None)
    if can is None or not can():
        raise No("it has no generate")
    inputs = {n: t for n, t in tiny.inputs.items() if n != "decoder_input_ids"}
    given: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "do_sample": False}
    given |= {"max_new_tokens": 5, "min_new_tokens": 5}
    if tiny.model.config.is_encoder_decoder:
        given["decoder_start_token_id"] = 2

    def tokens(model: Any) -> Any:
        torch.manual_seed(7)
        return model.generate(**inputs, **given)

    try:
        expected = tokens(copy.deepcopy(tiny.model))
    except Exception as error:
        raise No(f"plain: {type(error).__name__}: {error}"[:120]) from None
    model = copy.deepcopy(tiny.model)
    bigops.fuse_(model)
    got = tokens(model)
    if isinstance(expected, Tensor) and not torch.equal(got, expected):
        raise WrongError(f"the fused model says {got.tolist()}, plain {expected.tolist()}"[:160])
    got = tokens(_int8(tiny))
    if isinstance(expected, Tensor) and got.shape != expected.shape:
        raise WrongError(f"the int8 model gives {list(got.shape)}, plain {list(expected.shape)}")


def adapted(tiny: Tiny, plain: Plain, taken: dict[str, int]) -> None:
    """`add_lora_` on int8 layers, one step: what the loss depends on moves, and only adapters."""
    model = _int8(tiny)
    record = bigops.add_lora_(model, 2)
    taken["layers"] = len(record.done)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loss = _loss(outputs(model, tiny.inputs))
    if not loss.requires_grad:
        if any(f"{entry.name}.weight" in plain.gradients for entry in record.done):
            raise WrongError("no adapter has a gradient")
        raise No("no output depends on a linear layer")
    loss.backward()
    optimizer.step()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    if moved - names:
        raise WrongError(f"{sorted(moved - names)[0]} moved")
    for entry in record.done:
        grad = plain.gradients.get(f"{entry.name}.weight")
        ours = {n for n in names if n.startswith(f"{entry.name}.")}
        if grad is not None and grad.abs().max() > 1e-4 * plain.largest and not moved & ours:
            raise WrongError(f"the adapter of {entry.name} has no gradient, its weight has one")


VERBS: dict[str, Callable[..., None]] = {
    "fuse_": fused,
    "Int8": compressed(bigops.Int8()),
    "sparse int8": compressed(bigops.Sparse(0.5) + bigops.Int8()),
    "save and load": saved,
    "generate": generated,
    "LoRA": adapted,
}
