"""Compile every Triton kernel and shipped config for GPUs that are not here; read what came out.

    python tests/kernels/gpu_report/report.py [--arch sm_90] [--quick] [--sample N] [--out FILE.csv]
                                              [--check FILE.csv] [--update] [--plot]

One row per kernel form, config, dtype and device: registers, spilled bytes, shared memory, warps,
programs per multiprocessor and what limits them, counts of the instructions that matter. The exit
status is 1 where a row spills or reads or writes local memory (scratch, on AMD), asks for more
shared memory than the device has, or lacks the matrix instruction its tile is for; with --check,
also where a row is worse than in FILE.
--sample N compiles every Nth row of each kernel and device, and with --check all that FILE does not
hold as they are now (golden.py); --update compiles only the latter, writes them to the
committed table and draws it (plot.py); --plot only draws. A row whose source moved but whose
intermediate code did not is kept and not compiled. Triton keeps what it compiled: a run that was
broken off goes on where it was.
Nothing here is a time: no GPU runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

# Interpreted kernels cannot be compiled, and triton reads the variable on import.
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from bigops.kernels import fused_linear
from bigops.kernels.common import gemm, tiles
from bigops.kernels.common.activation import NAMES, split_code
from bigops.kernels.common.launch import launch_options
from tests.kernels.gpu_report import golden as gpu_golden
from tests.kernels.gpu_report import jobs_fp8 as fp8
from tests.kernels.gpu_report import jobs_low_rank as low_rank
from tests.kernels.gpu_report import jobs_persistent as persistent
from tests.kernels.gpu_report import jobs_quantized as quantized
from tests.kernels.gpu_report import jobs_sparse as sparse
from tests.kernels.gpu_report import jobs_training as training
from tests.kernels.gpu_report import plot as gpu_plot
from tests.kernels.gpu_report.devices import ARCHS, occupancy
from tests.kernels.gpu_report.golden import GOLDEN, KEY, Row, regressions
from tests.kernels.gpu_report.jobs import (
    TRITON_TYPE,
    constants_of,
    largest,
    launched,
    other_activations,
    pointer,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Kernels that must use a matrix unit; those of the first line read aligned tiles by cp.async.
PRODUCTS = (
    "gemm",
    "gemm_persistent",
    "quantized_gemm",
    "quantized_gradient",
    "fp8_gradient",
    "fp8_gemm",
    "low_rank_product",
    "block_product",
    "block_samples",
)
COPIED = ("low_rank_product", "block_product", "block_samples")

COUNTS = {  # column: machine instructions, as nvdisasm and the AMDGPU back end spell them
    "mma": r"HMMA|IMMA|QMMA",
    "wgmma": r"HGMMA|IGMMA|QGMMA",
    "tcgen05": r"UTC\w*MMA",
    "mfma": r"v_mfma_\w+",
    "ldmatrix": r"LDSM",
    "cp_async": r"LDGSTS",
    "tma": r"UTMALDG|UTMASTG|UBLKCP",
    "local": r"LDL|STL|scratch_(?:load|store)\w*",
    "atomics": r"ATOMG?|RED|(?:global|flat|buffer)_atomic_\w+",
}

KERNELS = {
    "gemm": gemm.gemm,
    "activation_backward": fused_linear.activation_backward,
    "sum_rows": fused_linear.sum_rows,
}
# Files with the rows of further ops: KERNELS, jobs(), arguments() and unaligned().
FILES = (persistent, quantized, fp8, low_rank, sparse, training)
OWNERS = {name: file for file in FILES for name in file.KERNELS}


class Job(NamedTuple):
    """One thing to compile."""

    arch: str
    kernel: str  # name in KERNELS or in those of a file
    form: str  # gemm: nt (x W^T), nn (gz W), tn (gz^T x), gated, or nt_odd and so on, see `jobs`
    dtype: str
    tile: tiles.TileConfig | tiles.PointwiseConfig
    activation: str
    precision: str = "ieee"

    @property
    def key(self) -> tuple[str, ...]:
        tile = str(launched(self.tile))
        parts = (self.arch, self.kernel, self.form, self.dtype, tile)
        return (*parts, self.activation, self.precision)


FACTS = (
    "registers",
    "spill_bytes",
    "shared_bytes",
    "warps",
    "programs_per_sm",
    "limiter",
    *COUNTS,
    "verdict",
    "digest",
    "ir",
)


def jobs(arch: str) -> Iterator[Job]:
    """Every kernel form with every shipped config and dtype of one device.

    Forward rows carry the whole epilogue (bias, erf, residual, stored pre-activation), which needs
    the most registers; each other activation is compiled once per dtype class with the main tile.
    A form's suffix says what is unlike a large aligned product: rows (an odd M), even (BLOCK_K
    divides K), wide (64-bit strides), odd (odd sizes and strides), loose (also no unit stride),
    ones (M, N and K are 1, which triton turns into constants).
    """
    table = tiles.table_for(arch)
    pointer = [entry for entry in table.entries if not entry.config.persistent]
    for entry in pointer:
        form, worst = ("gated", "geglu") if entry.form == "gated" else ("nt", "gelu")
        for dtype in entry.dtypes:
            precisions = ("ieee", "tf32") if dtype == "f32" and arch[:2] == "sm" else ("ieee",)
            for precision in precisions:
                forms = [(form if entry.aligned else f"{form}_odd", worst)]
                if not entry.aligned:
                    forms += [(f"{form}_loose", worst)]
                    forms += [(f"{form}_ones", worst)] if dtype == "bf16" else []
                elif form == "nt":
                    forms += [("nn", "none"), ("tn", "none")]
                for shape, activation in forms:
                    yield Job(arch, "gemm", shape, dtype, entry.config, activation, precision)
            main = entry == largest(pointer, entry.form, dtype)
            if main and entry.aligned and dtype != "f16":
                for variant in ("rows", "even", "wide"):
                    yield Job(arch, "gemm", f"{form}_{variant}", dtype, entry.config, worst)
                for name in other_activations(form == "gated", worst):
                    yield Job(arch, "gemm", form, dtype, entry.config, name)
    for code, name in enumerate(NAMES):
        form = "gated" if split_code(code)[1] else "plain"
        dtypes = TRITON_TYPE if name in ("gelu", "geglu") else ("bf16",)
        for dtype in dtypes:
            yield Job(arch, "activation_backward", form, dtype, table.pointwise, name)
    for form, name in (("plain", "gelu"), ("gated", "geglu")):
        yield Job(arch, "activation_backward", f"{form}_ones", "bf16", table.pointwise, name)
    yield Job(arch, "sum_rows", "plain_ones", "bf16", table.pointwise, "none")
    for dtype in TRITON_TYPE:
        yield Job(arch, "sum_rows", "plain", dtype, table.pointwise, "none")
    for file in FILES:
        yield from file.jobs(arch, Job)


def quick_jobs() -> list[Job]:
    """A few rows that stand for the rest: the main tile of each device, forward, bf16."""
    chosen = []
    for arch in ARCHS:
        tile = tiles.choose_config(arch, torch.bfloat16, 4096, 4096, 4096)
        kernel = "gemm_persistent" if tile.persistent else "gemm"
        chosen.append(Job(arch, kernel, "nt", "bf16", tile, "gelu"))
    return chosen


def all_jobs() -> list[Job]:
    """Of every device, in the order of the committed table."""
    return [job for arch in ARCHS for job in jobs(arch)]


def stale(wanted: list[Job], golden: list[dict[str, str]]) -> list[Job]:
    """The jobs that the table does not hold, or holds as something else compiled them."""
    known = gpu_golden.by_key(golden)
    return [
        job
        for job in wanted
        if job.key not in known or known[job.key].get("digest") != compilation(job).digest
    ]


def sampled(wanted: list[Job], every: int | None) -> list[Job]:
    """Every so-manieth job of each kernel on each device, from the first; none without a number."""
    if not every:
        return []
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for job in wanted:
        if seen[job.arch, job.kernel] % every == 0:
            chosen.append(job)
        seen[job.arch, job.kernel] += 1
    return chosen


def _arguments(job: Job) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    if job.kernel in OWNERS:
        found: tuple[Any, dict[str, str], dict[str, Any]] = OWNERS[job.kernel].arguments(job)
        return found
    fn, typed = KERNELS[job.kernel], pointer(job)
    types = {name: "i32" for name in fn.arg_names if name.islower()} | dict.fromkeys("MNKR", "i32")
    if job.kernel == "sum_rows":
        types |= {"partial": "*fp32", "out": typed}
        return fn, types, constants_of(fn, job)
    own: dict[str, Any] = {"GATED": split_code(NAMES.index(job.activation))[1]}
    if job.kernel == "activation_backward":
        types |= dict.fromkeys(("grad", "preact", "gz"), typed) | {"partial": "*fp32"}
        own |= {"stride_gn": 1, "stride_zn": 1}
        if job.activation == "none":
            own |= {"preact": None, "gz": None}
        return fn, types, constants_of(fn, job, **own)
    types |= dict.fromkeys(("a", "b", "bias", "residual", "c", "preact"), typed)
    if job.form.startswith(("nt", "gated")):
        if not job.form.endswith("_loose"):
            own |= {"stride_ak": 1, "stride_bk": 1, "stride_rn": 1}
    else:
        own |= {"bias": None, "residual": None, "preact": None, "stride_bn": 1}
        own["stride_ak" if job.form == "nn" else "stride_am"] = 1
    return fn, types, constants_of(fn, job, **own)


class Compilation(NamedTuple):
    """What triton is asked for."""

    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]

    @property
    def digest(self) -> str:
        return gpu_golden.digest(*self)

    @property
    def ir(self) -> str:
        return gpu_golden.ir_digest(*self)


def compilation(job: Job) -> Compilation:
    """How triton compiles a job for a launch with sizes divisible by 16."""
    fn, types, constants = _arguments(job)
    if job.form.endswith("_ones") and job.kernel not in OWNERS:
        constants |= {name: 1 for name in "MNKR" if name in fn.arg_names}
    signature = {n: "constexpr" if n in constants else types[n] for n in fn.arg_names}
    odd = {"rows": "M", "odd": types, "loose": types, "ones": types}.get(
        job.form.partition("_")[2], ()
    )
    if job.kernel in OWNERS:
        odd = OWNERS[job.kernel].unaligned(job)
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(fn.arg_names)
        if signature[n].startswith("*") or (signature[n] == "i32" and n not in odd)
    }
    source = ASTSource(fn, signature=signature, constexprs=constants, attrs=attrs)
    stages = job.tile.num_stages if isinstance(job.tile, tiles.TileConfig) else None
    rounds_as_torch = job.kernel in ("act_quant", "quantize_fp8")
    options = launch_options(job.tile.num_warps, stages, fp_fusion=not rounds_as_torch)
    if job.arch.startswith("gfx"):
        target = GPUTarget("hip", job.arch, 64)
    else:
        target = GPUTarget("cuda", int(job.arch[3:]), 32)
    return Compilation(source, target, options)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-400:]}")
    return done.stdout + done.stderr


def _search(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise RuntimeError(f"nothing matches {pattern!r} in the compiler's output")
    return int(found[1])


def _ptxas_spills(kernel: Any, asked: Compilation) -> int:
    """The bytes ptxas spills in triton's own call: other flags than its give other spills."""
    backend = make_backend(asked.target)
    options = backend.parse_options(dict(asked.options))
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, options, asked.target.arch)
    stores = _search(r"(\d+) bytes spill stores", log.getvalue())
    return stores + _search(r"(\d+) bytes spill loads", log.getvalue())


def _nvidia_facts(job: Job, kernel: Any, asked: Compilation) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    facts = {"registers": _search(r"REG:(\d+)", usage), "spill_bytes": 0}
    # A spill lives in the stack frame: only where there is one is ptxas asked for the bytes.
    if _search(r"STACK:(\d+)", usage):
        facts["spill_bytes"] = _ptxas_spills(kernel, asked)
    facts |= _count(code, job)
    return facts


def _amd_facts(job: Job, kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]
    registers = _search(r"\.vgpr_count:\s+(\d+)", code)
    spilled = _search(r"\.vgpr_spill_count:\s+(\d+)", code)
    spilled += _search(r"\.sgpr_spill_count:\s+(\d+)", code)
    return {
        "registers": registers,
        "spill_bytes": 4 * spilled,
        **_count(code, job),
    }


def _count(code: str, job: Job) -> dict[str, int]:
    counted = COUNTS | (quantized.WHOLE_COUNTS if quantized.whole(job) else {})
    counted |= fp8.CODE_COUNTS if fp8.by_unit(job) else {}
    return {name: len(re.findall(rf"\b(?:{names})\b", code)) for name, names in counted.items()}


def expected_instruction(job: Job) -> str | None:
    """The matrix instruction a row must hold; None where the device has none for the product.

    wgmma and tcgen05 need 64 rows; smaller tiles use mma.sync. IEEE float32 has no tensor core
    on NVIDIA devices, it has on CDNA3.
    """
    if job.kernel not in PRODUCTS:
        return None
    if job.arch.startswith("gfx"):
        return "mfma"
    if job.dtype == "f32" and not (quantized.whole(job) or fp8.rounded(job)):
        return None
    small = job.tile.block_m < 64
    return "mma" if small else {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(job.arch, "mma")


def verdict(job: Job, facts: dict[str, Any], shared_limit: int) -> str:
    """ "ok", or what the gate holds against the row."""
    faults = []
    maps = persistent.MAPS if job.kernel in persistent.KERNELS else 0
    if int(facts["atomics"]) != maps:
        faults.append("atomics")
    if maps and int(facts["tma"]) == 0:
        faults.append("no tma")
    if int(facts["spill_bytes"]) > 0:
        faults.append(f"spills {facts['spill_bytes']} bytes")
    if int(facts["local"]) > 0:
        faults.append(f"uses local memory by {facts['local']} instructions")
    if int(facts["shared_bytes"]) > shared_limit:
        faults.append(f"shared memory {facts['shared_bytes']} > {shared_limit}")
    needed = expected_instruction(job)
    if needed and int(facts[needed]) == 0:
        faults.append(f"no {needed}")
    copies = job.form in ("nt", "gated") or (job.kernel in COPIED and "loose" not in job.form)
    if needed and job.arch == "sm_80" and copies and int(facts["cp_async"]) == 0:
        faults.append("no cp_async")
    return "; ".join(faults) or "ok"


def renew(job: Job, known: Row | None) -> dict[str, Any]:
    """The row of a job: ``known`` with its new digest where the compiler gets what it got then."""
    asked = compilation(job)
    if known is not None and known["ir"] == asked.ir:
        return {**known, "digest": asked.digest}
    return measure(job)


def measure(job: Job) -> dict[str, Any]:
    """Compile one job and give its row; a compilation that fails is a row with that verdict."""
    row: dict[str, Any] = dict(zip(KEY, job.key, strict=True))
    try:
        asked = compilation(job)
        row |= {"digest": asked.digest, "ir": asked.ir}
        kernel = triton.compile(asked.source, target=asked.target, options=asked.options)
    except Exception as error:  # triton raises many kinds; each is a fault of this config
        return (
            dict.fromkeys(FACTS, 0)
            | row
            | {"verdict": f"{type(error).__name__}: {str(error)[:160]}"}
        )
    amd = job.arch.startswith("gfx")
    facts = _amd_facts(job, kernel) if amd else _nvidia_facts(job, kernel, asked)
    facts |= {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    held = occupancy(job.arch, facts["registers"], facts["shared_bytes"], facts["warps"])
    facts |= {"programs_per_sm": held.programs, "limiter": held.limiter}
    facts["verdict"] = verdict(job, facts, tiles.table_for(job.arch).shared_memory)
    return {name: (row | facts)[name] for name in (*KEY, *FACTS)}


def _line(row: dict[str, Any]) -> str:
    counts = " ".join(f"{name}:{row[name]}" for name in COUNTS if int(row[name]))
    return (
        f"{' '.join(str(row[name]) for name in KEY)} | registers {row['registers']} "
        f"spill {row['spill_bytes']} shared {row['shared_bytes']} warps {row['warps']} "
        f"programs {row['programs_per_sm']} ({row['limiter']}) | {counts} | {row['verdict']}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHS, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="one row per device")
    parser.add_argument("--out", type=Path, help="write the table as CSV")
    parser.add_argument("--check", type=Path, help="compare with a CSV written earlier")
    parser.add_argument("--sample", type=int, metavar="N", help="only every Nth row of each kernel")
    parser.add_argument("--update", action="store_true", help="renew the committed table")
    parser.add_argument("--plot", action="store_true", help="only draw the committed table")
    options = parser.parse_args(argv)
    if options.plot:
        gpu_plot.draw(gpu_golden.read())
        print(f"{gpu_plot.PICTURE} drawn")
        return 0
    archs = options.arch or ARCHS
    todo = [job for job in (quick_jobs() if options.quick else all_jobs()) if job.arch in archs]
    known = gpu_golden.read(options.check or GOLDEN) if options.check or options.update else []
    compiled, changed = todo, []
    if options.sample or options.update:
        changed = stale(todo, known) if known else []
        compiled = [job for job in sampled(todo, options.sample) if job not in changed]
    before = [gpu_golden.by_key(known).get(job.key) for job in changed]
    rows = []
    # A compilation uses one core and the whole sweep is an hour of one. Spawned workers, since
    # LLVM and triton keep state that a fork would share.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        renewed = pool.map(renew, changed, before, chunksize=8)
        for row in itertools.chain(renewed, pool.map(measure, compiled)):
            rows.append(row)
            print(_line(row), flush=True)
    if options.out:
        gpu_golden.write(options.out, (*KEY, *FACTS), rows)
    if options.update:
        table = gpu_golden.by_key(known) | gpu_golden.by_key(rows)
        in_order = [table[key] for key in (job.key for job in all_jobs()) if key in table]
        gpu_golden.write(GOLDEN, (*KEY, *FACTS), in_order)
        gpu_plot.draw(gpu_golden.read())
    faults = [_line(row) for row in rows if row["verdict"] != "ok"]
    if options.check:
        faults += regressions(rows, known)
    print(f"{len(rows)} rows, {len(faults)} faults")
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
