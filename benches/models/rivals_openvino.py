"""OpenVINO on whole models: converted from torch.export, int8 by NNCF, int4 weights for decoding.

Source: NNCF's `quantize` with model_type TRANSFORMER and its `compress_weights`, as its
documentation has them for transformers.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigops.benches import rivals_openvino
from bigops.benches.harness import LeftOut
from bigops.benches.models import isa, kept
from bigops.benches.models.rivals_torch import exported
from bigops.benches.models.side import Make, Side
from bigops.benches.models.subject import Call, Inputs, Subject
from bigops.benches.rivals_openvino import BF16, FP32

GROUP = 64  # columns of an int4 weight that share a scale


def converted(subject: Subject, lengths: tuple[int, int] | None = None) -> Any:
    """The model as OpenVINO's, in float32.

    Raises:
        LeftOut: not installed, or it does not take the model.
    """
    rivals_openvino.core()
    import openvino

    program = exported(subject, lengths)
    try:
        return openvino.convert_model(program)
    except Exception as failure:
        raise LeftOut(f"openvino: {subject.name}: {failure!s:.200}") from failure


def nncf() -> Any:
    """The package, which is told to be quiet and to send no usage data.

    Raises:
        LeftOut: not installed.
    """
    if importlib.util.find_spec("nncf") is None:
        raise LeftOut("nncf is not installed")
    os.environ.setdefault("NNCF_CI", "1")  # its own switch
    import nncf as package

    package.set_log_level(logging.ERROR)
    return package


def int8(subject: Subject, lengths: tuple[int, int] | None = None) -> Any:
    """Static int8, calibrated on the subject's samples, after SmoothQuant.

    Raises:
        LeftOut: not installed, or it does not take the model.
    """
    device, _ = rivals_openvino.core()
    tool = nncf()
    import openvino

    made_by = (openvino.__version__, tool.__version__, str(lengths))
    file = kept.folder() / f"openvino-int8-{kept.stem(subject, *made_by)}.xml"
    if not file.exists():
        model = converted(subject, lengths)
        samples = tool.Dataset(subject.calibration, lambda given: [x.numpy() for x in given])
        quantized = tool.quantize(
            model,
            samples,
            model_type=tool.ModelType.TRANSFORMER,
            subset_size=len(subject.calibration),
        )
        unfinished = file.with_stem(f"{file.stem}-{os.getpid()}")
        openvino.save_model(quantized, unfinished, compress_to_fp16=False)
        # the weights first: a file of that name has them beside it
        os.replace(unfinished.with_suffix(".bin"), file.with_suffix(".bin"))
        os.replace(unfinished, file)
    return device.read_model(file)


def int4(subject: Subject) -> Any:
    """Weights in 4 bits by groups of `GROUP`, all of them.

    Raises:
        LeftOut: not installed, or it does not take the model.
    """
    tool = nncf()
    return tool.compress_weights(
        converted(subject),
        mode=tool.CompressWeightsMode.INT4_SYM,
        group_size=GROUP,
        ratio=1.0,
        all_layers=True,
    )


def side(name: str, make: Any, hint: dict[str, str], subject: Subject) -> Side:
    """A converted model, compiled with a precision hint for what it left in float."""
    model = make(subject)
    device, _ = rivals_openvino.core()
    ready = device.compile_model(model, "CPU", rivals_openvino.config(hint))
    return Side(f"openvino {name}", caller(ready), used(ready), nbytes(model), own_pool=True)


def makers(decode: bool) -> dict[str, Make]:
    """The sides by name."""
    forms: dict[str, tuple[Any, dict[str, str]]] = {
        "fp32": (converted, FP32),
        "bf16": (converted, BF16),
        "int8": (int8, FP32),
        "int8 bf16": (int8, BF16),
    }
    if decode:
        forms |= {"int4": (int4, FP32)}
    return {f"openvino {name}": partial(side, name, *form) for name, form in forms.items()}


# --- how ---------------------------------------------------------------------------------------


def caller(ready: Any) -> Call:
    """A call of a compiled model on torch's memory, by one request: for one thread at a time."""
    request = ready.create_infer_request()
    bound: list[Inputs] = [()]

    def call(*inputs: Tensor) -> Tensor:
        if len(inputs) != len(bound[0]) or any(map(_other, inputs, bound[0])):
            for place, tensor in enumerate(inputs):
                request.set_input_tensor(place, rivals_openvino.shared(tensor))
            bound[0] = inputs  # the request holds addresses only
        request.infer(share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


def _other(one: Tensor, two: Tensor) -> bool:
    return one is not two


def used(ready: Any) -> str:
    """The instruction set: AMX where one of its kernels names it, else the most it may use."""
    kernels = [
        str(info["primitiveType"].value)
        for node in ready.get_runtime_model().get_ordered_ops()
        if "primitiveType" in (info := node.get_rt_info())
    ]
    if any("amx" in kernel for kernel in kernels):
        return "amx"
    top = isa.onednn()
    return "avx512_bf16" if top == "amx" else top


def nbytes(model: Any) -> int:
    """Bytes of all constants."""
    constants = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    return sum(int(op.get_byte_size()) for op in constants)
