"""What only a device can show: streams, graphs, several GPUs, huge tensors, sanitizer, tuning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.backend import gpu_tiles
from bigops.formats.quantized import QuantizedWeight
from bigops.kernels.common.tiles import device_arch
from bigops.ops import tuned as _triton_tuned
from bigops.tune import tiles as tune_gpu
from tests.gpu.conftest import Place
from tests.support.cases import linear as linear_cases
from tests.support.cases.linear import Case
from tests.support.kernels_ran import expect
from tests.support.tolerance import check

Need = Callable[..., None]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
ROOT = Path(__file__).resolve().parents[2]


def made(place: Place, large: int = 512, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A case whose tensors lie on the device; odd sizes, several tiles."""
    m, n, k = (place.size(large + 1, 35), place.size(1000, 20), place.size(2003, 33))
    case = linear_cases.make(m, n, k, dtype, "gelu")
    return Case(*place.put([*case.inputs, case.grad]), case.name)


def backward(case: Case) -> list[Tensor]:
    leaves = case.leaves()
    y = bigops.fused_linear(*leaves, case.name)
    wanted = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, case.grad)]


# --- on both -------------------------------------------------------------------------------------


def test_bitwise_equal_from_run_to_run(place: Place) -> None:
    case = made(place)
    w8 = place.put(QuantizedWeight.from_dense(case.weight.float().cpu()))
    runs = []
    for _ in range(place.size(5, 2)):
        with expect("triton.fused_linear.bf16", "triton.quantized_linear.bf16"):
            runs.append([*backward(case), bigops.quantized_linear(case.x, w8, case.bias)])
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


def test_autocast_is_a_cast_of_the_arguments(place: Place) -> None:
    case = made(place, dtype=torch.float32)
    with torch.autocast(place.device.type, torch.bfloat16), expect("triton.fused_linear.bf16"):
        y = bigops.fused_linear(*case.inputs, "gelu")
    cast = [None if t is None else t.bfloat16() for t in case.inputs]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, bigops.fused_linear(*cast, "gelu"))


def test_compiled_as_eager(place: Place) -> None:
    case = made(place)
    eager = backward(case)
    backend = "inductor" if place.real else "aot_eager"
    function = torch.compile(bigops.fused_linear, fullgraph=True, backend=backend)
    leaves = case.leaves()
    with expect("triton.fused_linear.bf16", "triton.fused_linear_backward.bf16"):
        y = function(*leaves, case.name)
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad)
    assert all(map(torch.equal, eager, [y.detach(), *grads]))


def test_explain_names_what_runs(place: Place) -> None:
    case = made(place)
    target = "cuda" if place.real else "interpreter"
    said = bigops.explain("fused_linear", *case.inputs, "gelu", device=target)
    with expect(said.kernel):
        bigops.fused_linear(*case.inputs, "gelu")


def test_tuning_measures_keeps_and_serves(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if place.real:
        target, timer = tune_gpu.target_of("cuda"), None
    else:
        machine = gpu_tiles.machine("no GPU", "interpreter", "3.9")
        target = tune_gpu.Target(place.device, machine)

        def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
            return {name: 1.0 + len(repr(call())) * 0 for name, call in calls.items()}

    shape = (place.size(256, 20), place.size(1024, 32), place.size(1024, 64))
    path = tune_gpu.tune(target, shapes=[shape], dtypes=["bf16"], timer=timer)
    data = gpu_tiles.read(path, target.machine)
    assert {key.partition(":")[0] for key in data["tiles"]} == set(tune_gpu.OPS)
    for key, points in data["points"].items():
        for point in points.values():
            assert point["seconds"], f"{key}: no tile ran: {point['failed']}"
            assert not point["failed"], f"{key}: a shipped tile does not run: {point['failed']}"
    table = _triton_tuned.checked(gpu_tiles.current(target.machine))
    assert table.tiles == data["tiles"]
    assert not table.ignored
    assert target.arch == device_arch(place.device)


@pytest.mark.parametrize("op", ["fused_linear", "low_rank_linear", "quantized_linear"])
def test_results_past_two_to_the_31_elements(op: str, place: Place, gpu: Need) -> None:
    if place.real:
        gpu(memory=12 << 30)
    m, n, k = place.size((1 << 16) + 40, 70), place.size(1 << 15, 48), 16
    border = (1 << 31) // n if place.real else 40
    assert m > border
    x, w, factor = place.put([torch.randn(s, k).bfloat16() for s in (m, n, k)])
    stored = place.put(QuantizedWeight.from_dense(w.float().cpu()))

    def call(rows: Tensor) -> Tensor:
        if op == "fused_linear":
            return bigops.fused_linear(rows, w)
        if op == "low_rank_linear":
            return bigops.low_rank_linear(rows, w, factor)
        return bigops.quantized_linear(rows, stored)

    with torch.inference_mode(), expect(f"triton.{op}.bf16"):
        y = call(x)
    for rows in (slice(0, 20), slice(border - 20, border + 20), slice(m - 20, m)):
        part = x[rows]
        if op == "quantized_linear":  # whole numbers: every tile gives the same sums
            assert torch.equal(y[rows], call(part))
            continue
        low = op == "low_rank_linear"
        first = [factor] if low else []
        plain, truth, scale = part, part.double(), part.double().abs()
        for matrix in (*first, w):
            plain, truth = F.linear(plain, matrix), F.linear(truth, matrix.double())
            scale = F.linear(scale, matrix.double().abs())
        check(y[rows], truth, plain, scale, what=f"rows {rows}")


# A program of its own for the sanitizer; ``device`` is given.
SANITIZED = """
import torch, bigops
from bigops.formats import QuantizedWeight
torch.manual_seed(0)
for m, n, k in ((5, 17, 33), (35, 20, 65)):
    x = torch.randn(m, k, device=device, requires_grad=True)
    w = torch.randn(n, k, device=device, requires_grad=True)
    bigops.fused_linear(x, w, None, None, "gelu").sum().backward()
    u, v = torch.randn(n, 4, device=device), torch.randn(4, k, device=device)
    bigops.low_rank_linear(x, u, v)
    bigops.quantized_linear(x, QuantizedWeight.from_dense(w.detach()))
    bigops.linear_cross_entropy(x, w, torch.arange(m, device=device) % n).backward()
"""


def test_a_small_program_runs_clean_under_compute_sanitizer(place: Place, tmp_path: Path) -> None:
    if not place.real:
        with expect("triton.fused_linear.f32", "triton.fused_linear_backward.f32"):
            exec(SANITIZED, {"device": "cpu"})
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("no compute-sanitizer on the path")
    program = tmp_path / "program.py"
    program.write_text(f"device = 'cuda'\n{SANITIZED}torch.cuda.synchronize()\n")
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    for kind in ("memcheck", "racecheck"):
        done = subprocess.run(
            [tool, f"--tool={kind}", "--error-exitcode=9", sys.executable, str(program)],
            capture_output=True,
            text=True,
            timeout=1800,
            env=env,
            check=False,
        )
        assert done.returncode == 0, f"{kind}: {done.stdout[-3000:]}{done.stderr[-1000:]}"


# --- on a GPU alone ------------------------------------------------------------------------------

FIRST = Place(torch.device("cuda", 0), True)


def on_gpu(place: Place) -> tuple[Case, QuantizedWeight]:
    case = made(place)
    return case, place.put(QuantizedWeight.from_dense(torch.randn(*case.weight.shape)))


@pytest.mark.gpu
def test_work_goes_to_the_current_stream(gpu: Need) -> None:
    gpu()
    case, weight = on_gpu(FIRST)
    want = backward(case)[0], bigops.quantized_linear(case.x, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    x = torch.zeros_like(case.x)
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)  # about 50 ms: a kernel on another stream would read zeros
        x.copy_(case.x)
        y = bigops.fused_linear(x, *case.inputs[1:], case.name)
        z = bigops.quantized_linear(x, weight)
    stream.synchronize()
    assert torch.equal(y, want[0])
    assert torch.equal(z, want[1])


@pytest.mark.gpu
def test_captured_in_a_graph_and_replayed_on_other_data(gpu: Need) -> None:
    gpu()
    case, weight = on_gpu(FIRST)
    x = case.x.clone()

    def calls() -> list[Tensor]:
        with torch.no_grad():
            y = bigops.fused_linear(x, *case.inputs[1:], case.name)
            low = bigops.low_rank_linear(x, case.weight[:, :16], case.weight[:16])
            return [y, low, bigops.quantized_linear(x, weight)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()  # compiles outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, calls()))


@pytest.mark.gpu
def test_tensors_of_another_than_the_current_device(gpu: Need) -> None:
    gpu(devices=2)
    case, weight = on_gpu(FIRST)
    want = [t.cpu() for t in (*backward(case), bigops.quantized_linear(case.x, weight))]
    other = Place(torch.device("cuda", 1), True)
    moved = Case(*other.put([*case.inputs, case.grad]), case.name)
    with torch.cuda.device(0):
        got = [*backward(moved), bigops.quantized_linear(moved.x, other.put(weight))]
        assert torch.cuda.current_device() == 0
    assert all(t.device == other.device for t in got)
    if device_arch(FIRST.device) == device_arch(other.device):  # the same tiles, then
        assert all(torch.equal(a, b.cpu()) for a, b in zip(want, got, strict=True))
    with pytest.raises(ValueError, match="weight: expected device cuda:1"):
        bigops.fused_linear(moved.x, case.weight)


class Fake:
    """A stream, a graph and the contexts of both where there is no GPU: they do nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def replay(self) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("place", ["interpreter"], indirect=True)
def test_the_bodies_for_a_gpu_alone_run_and_see_a_graph_that_replays_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Stream", "stream", "CUDAGraph", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    for name in ("_sleep", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(sys.modules[__name__], "FIRST", place)

    def need(**_: object) -> None:
        pass

    with expect("triton.fused_linear.bf16", "triton.quantized_linear.bf16"):
        test_work_goes_to_the_current_stream(need)
    with expect("triton.low_rank_linear.bf16"), pytest.raises(AssertionError, match="assert False"):
        test_captured_in_a_graph_and_replayed_on_other_data(need)
