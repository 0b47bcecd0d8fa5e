"""torch's own sides: eager, `torch.compile` with its weights frozen, int8 by torchao and Inductor.

Frozen means that weights are constants of the compiled code, so that oneDNN may pack them; without
it, and without torchao's quantiser imported, `torch.compile` would be a straw man.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigops.benches.harness import EAGER, LeftOut
from bigops.benches.models import isa
from bigops.benches.models.side import Make, Side, inference, nbytes
from bigops.benches.models.subject import Call, Inputs, Subject


def eager(subject: Subject) -> Side:
    """The model as it is."""
    model = subject.model
    return Side(EAGER, inference(model), isa.onednn(), nbytes(model), module=model)


def compiled(subject: Subject) -> Side:
    """float32 throughout."""
    call = frozen(subject.model, subject.inputs)
    return Side("torch.compile", call, isa.onednn(), nbytes(subject.model))


def compiled_bf16(subject: Subject) -> Side:
    """bfloat16 throughout."""
    narrow = narrowed(subject, torch.bfloat16)
    call = frozen(narrow, subject.inputs)
    return Side("torch.compile bf16", call, isa.onednn(), nbytes(narrow))


def torchao_int8(subject: Subject) -> Side:
    """Static int8 by torchao's quantiser for Inductor on x86, calibrated on the subject's samples.

    Raises:
        LeftOut: torchao is not installed, or cannot quantise the model.
    """
    if importlib.util.find_spec("torchao") is None:
        raise LeftOut("torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    module = exported(subject).module()
    module.graph.eliminate_dead_code()  # on a result that nobody reads the quantiser fails
    module.recompile()
    prepared = prepare_pt2e(module, quantizer)
    for sample in subject.calibration:
        prepared(*sample)
    quantized = convert_pt2e(prepared)
    call = frozen(quantized, subject.inputs)
    return Side("torchao int8", call, isa.onednn(), nbytes(quantized))


def makers() -> dict[str, Make]:
    """The sides by name."""
    return {
        EAGER: eager,
        "torch.compile": compiled,
        "torch.compile bf16": compiled_bf16,
        "torchao int8": torchao_int8,
    }


# --- how ---------------------------------------------------------------------------------------


def frozen(
    model: nn.Module, inputs: Inputs, backend: Any = "inductor", dynamic: bool = False
) -> Call:
    """`torch.compile` with the weights as constants; it compiles here.

    Args:
        model: in evaluation mode.
        inputs: what it is compiled for.
        backend: whose code: a name, or a function as `torch.compile` takes it.
        dynamic: sizes are left open.
    """
    from torch._inductor import config

    ready: Call = torch.compile(model, dynamic=dynamic, backend=backend)
    # read while it compiles; freezing wants no_grad, not inference mode
    with config.patch(freezing=True), torch.no_grad():
        ready(*inputs)
    return ready


@functools.lru_cache(maxsize=1)
def exported(subject: Subject, lengths: tuple[int, int] | None = None) -> Any:
    """The model as an `ExportedProgram`.

    Args:
        subject: the model and its inputs.
        lengths: the least and the most tokens, the last dimension of every input; None: as given.

    Raises:
        LeftOut: torch.export does not take the model.
    """
    shapes: Any = None
    if lengths is not None:
        low, high = lengths
        length = torch.export.Dim("length", min=low, max=high)
        shapes = tuple({x.dim() - 1: length} for x in subject.inputs)
        # one parameter of the model's forward may hold them all
        if len(shapes) != len(_parameters(subject.model)):
            shapes = (shapes,)
    try:
        with torch.no_grad():
            return torch.export.export(
                subject.model, subject.inputs, dynamic_shapes=shapes, strict=False
            )
    except Exception as failure:
        raise LeftOut(f"{subject.name}: torch.export: {failure!s:.200}") from failure


def _parameters(model: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


class Narrow(nn.Module):
    """A model in another dtype between inputs and an output of float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype)
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        given = [x.to(self.dtype) if x.is_floating_point() else x for x in inputs]
        return self.model(*given).float()


def narrowed(subject: Subject, dtype: torch.dtype) -> nn.Module:
    """The subject's model computing in ``dtype``, called as before."""
    return Narrow(subject.model, dtype).eval()
