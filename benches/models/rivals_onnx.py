"""onnxruntime on whole models: exported by torch, int8 by its own quantiser, dynamic and static."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigops.benches import rivals_onnx
from bigops.benches.harness import LeftOut
from bigops.benches.models import isa
from bigops.benches.models.rivals_torch import exported
from bigops.benches.models.side import Make, Side
from bigops.benches.models.subject import Call, Inputs, Subject

PRODUCTS = ["MatMul", "Gemm", "Conv"]


def graph(subject: Subject, folder: Path, lengths: tuple[int, int] | None = None) -> Path:
    """The model as an ONNX file in a folder, in float32.

    Raises:
        LeftOut: not installed, or it does not take the model.
    """
    missing = [n for n in ("onnxruntime", "onnx", "onnxscript") if not importlib.util.find_spec(n)]
    if missing:
        raise LeftOut(f"{missing[0]} is not installed")
    file = folder / "fp32.onnx"
    program = exported(subject, lengths)
    try:
        made = torch.onnx.export(program, dynamo=True, verbose=False)
        assert made is not None
        made.save(file)
    except Exception as failure:
        raise LeftOut(f"onnxruntime: {subject.name}: {failure!s:.200}") from failure
    return file


def fp32(file: Path, subject: Subject) -> Path:
    """As it was exported."""
    return file


def int8_dynamic(file: Path, subject: Subject) -> Path:
    """int8 columns of W; each x by one scale and zero point found at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = file.with_name("dynamic.onnx")
    quantize_dynamic(
        prepared(file), made, per_channel=True, weight_type=QuantType.QInt8, extra_options=CHECKED
    )
    return made


def int8_static(file: Path, subject: Subject) -> Path:
    """int8 columns of W, x by the range of the subject's samples."""
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    names = [one.name for one in InferenceSession(file, options()).get_inputs()]

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Inputs] = iter(subject.calibration)

        def get_next(self) -> Any:
            given = next(self.left, None)
            return given and {n: x.numpy() for n, x in zip(names, given, strict=True)}

    made = file.with_name("static.onnx")
    quantize_static(
        prepared(file),
        made,
        Samples(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=PRODUCTS,
        extra_options=CHECKED,
    )
    return made


# products of two activations stay in float: attention's own, which its int8 kernels do not serve
CHECKED = {"MatMulConstBOnly": True}


def prepared(file: Path) -> Path:
    """The graph after the passes that the quantisers ask for; as it was where they fail."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    made = file.with_name("prepared.onnx")
    if not made.exists():
        try:
            quant_pre_process(file, made, skip_symbolic_shape=True)
        except Exception:  # a shape that it cannot infer
            return file
    return made


Form = Callable[[Path, Subject], Path]


def side(name: str, form: Form, subject: Subject) -> Side:
    """A model in a form of the quantiser's, or in float32."""
    with tempfile.TemporaryDirectory(prefix="bigops-onnx-") as folder:
        file = form(graph(subject, Path(folder)), subject)
        size = sum(one.stat().st_size for one in file.parent.glob(f"{file.name}*"))
        call = caller(session(file))
    return Side(f"onnxruntime {name}", call, isa.onnxruntime(), size, own_pool=True)


def makers() -> dict[str, Make]:
    """The sides by name."""
    forms: dict[str, Form] = {"int8 dynamic": int8_dynamic, "int8 static": int8_static}
    return {f"onnxruntime {name}": partial(side, name, form) for name, form in forms.items()}


# --- how ---------------------------------------------------------------------------------------


def options(threads: int | None = None) -> Any:
    """One call at a time with all of torch's threads, or as many as given."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = threads or torch.get_num_threads()
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3
    return chosen


def session(file: Path, threads: int | None = None) -> Any:
    """The file, ready to run; it may be removed afterwards.

    Raises:
        LeftOut: not installed.
    """
    if not rivals_onnx.available():
        raise LeftOut("onnxruntime or onnx is not installed")
    import onnxruntime

    return onnxruntime.InferenceSession(file, options(threads), providers=["CPUExecutionProvider"])


def caller(ready: Any) -> Call:
    """A call of a session; several threads may make it at a time."""
    names = [one.name for one in ready.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(ready.run(None, given)[0])

    return call
