"""The Triton kernels compiled for GPUs that are not here, in a process of their own.

Interpreted kernels cannot be compiled, and the unit suite interprets them: see gpu_report/.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from tests.kernels.gpu_report import golden as gpu_golden

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "gpu_report.csv"
of_the_table = pytest.mark.skipif(
    triton.__version__ != gpu_golden.TRITON,
    reason=f"the table is of triton {gpu_golden.TRITON}; this is {triton.__version__}",
)
REPORT = "tests/kernels/gpu_report/report.py"
ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_main_tile_of_each_device_passes_the_gate(
    record_property: Callable[[str, object], None],
) -> None:
    done = _run(REPORT, "--quick", "--check", str(GOLDEN))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| ok") == 8, done.stdout
    assert "8 rows, 0 faults" in done.stdout
    record_property("gpu_rows", 8)


@pytest.mark.slow
@of_the_table
@pytest.mark.parametrize("arch", ARCHS)
def test_a_sample_of_all_rows_passes_the_gate(
    arch: str, record_property: Callable[[str, object], None]
) -> None:
    """Every 18th row of each kernel: about 170 of all, which is what CI has the time for."""
    done = _run(REPORT, "--arch", arch, "--sample", "10", "--check", str(GOLDEN))
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    rows = int(last.split()[0])
    assert rows >= 20
    with GOLDEN.open(newline="") as file:
        kernels = {row["kernel"] for row in csv.DictReader(file) if row["arch"] == arch}
    assert {line.split()[1] for line in lines} == kernels
    record_property("gpu_rows", rows)


DIGESTS = '''
import json
from bigops.kernels.common import gemm
from tests.kernels.gpu_report import golden, report

CALLED = "    tile_m, tile_n = banded_tile(pid, tiles_m, GROUP_M * tl.cdiv(N, BLOCK_N), GROUP_M)\\n"
WRITTEN_OUT = """
    band = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = (pid // band) * GROUP_M
    band_rows = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (pid % band) % band_rows
    tile_n = (pid % band) // band_rows
"""
jobs, rows = report.all_jobs(), golden.read()
first = report.quick_jobs()[0]
asked = report.compilation(first)
digests = {"same": [asked.digest, asked.ir]}
fn = report.KERNELS["gemm"]
source = fn.src
changes = {
    "remark": source + "    # a remark\\n",
    "place": "\\n" * 7 + source,
    "branch not taken": source.replace("u_tile = b_tile + ", "u_tile = b_tile - "),
    "written out": source.replace(CALLED, WRITTEN_OUT),
    "code": source.replace("rm < M", "rm <= M"),
}
assert CALLED in source
for name, changed in changes.items():
    fn._unsafe_update_src(changed)
    golden._sources.cache_clear()
    asked = report.compilation(first)
    digests[name] = [asked.digest, asked.ir]
    if name == "branch not taken":
        row = {"registers": "as before", "digest": "", "ir": asked.ir}
        renewed = report.renew(first, row)
fn._unsafe_update_src(source)
golden._sources.cache_clear()
asked = report.compilation(first)
for name, options in {"default": {"num_ctas": 1}, "option": {"enable_fp_fusion": False}}.items():
    other = asked._replace(options=asked.options | options)
    digests[name] = [other.digest, other.ir]
known = golden.by_key(rows)
limits = {arch: report.tiles.table_for(arch).shared_memory for arch in report.ARCHS}
judged = {" ".join(job.key): report.verdict(job, known[job.key], limits[job.arch])
          for job in jobs if job.key in known}
print(json.dumps({
    "digests": digests,
    "renewed": renewed,
    "stale": [job.key for job in report.stale(jobs, rows)],
    "unknown": len(report.stale(jobs[:3], rows[1:])),
    "gone": sorted(set(golden.by_key(rows)) - {job.key for job in jobs}),
    "rows": len(rows),
    "kernels": sorted({row["kernel"] for row in rows}),
    "faults": [row for row in rows if row["verdict"] != "ok"],
    "judged": judged,
}))
'''


@pytest.fixture(scope="module")
def table() -> dict:
    done = _run("-c", DIGESTS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@of_the_table
def test_the_committed_table_is_of_these_kernels_and_configs(table: dict) -> None:
    """Where it is not: `make gpu-report ARGS=--update` compiles what changed and writes it."""
    assert table["stale"] == []
    assert table["unknown"] == 1
    assert table["gone"] == []
    assert table["faults"] == []
    assert table["rows"] >= 150


def test_the_gate_of_today_passes_every_committed_row(table: dict) -> None:
    """A row keeps the verdict of the gate that compiled it, which may have been a laxer one."""
    assert len(table["judged"]) == table["rows"]
    assert {key: said for key, said in table["judged"].items() if said != "ok"} == {}


def test_a_digest_moves_with_the_code_and_not_with_remarks(table: dict) -> None:
    digests = table["digests"]
    written, got = digests["same"]
    assert digests["remark"] == digests["place"] == [written, got]
    for moved in ("branch not taken", "written out", "default"):  # the compiler gets the same
        assert digests[moved][0] != written, moved
        assert digests[moved][1] == got, moved
    for moved in ("code", "option"):
        assert digests[moved][0] != written, moved
        assert digests[moved][1] != got, moved


def test_a_row_whose_intermediate_code_stayed_is_not_compiled_again(table: dict) -> None:
    written, got = table["digests"]["branch not taken"]
    assert table["renewed"] == {"registers": "as before", "digest": written, "ir": got}


QUANTISED = """
import json
from tests.kernels.gpu_report import golden, report
from tests.kernels.gpu_report import jobs_quantized as quantized

# one whole-number and one floating product of each device, and a device whose row lacks them
chosen = {}
for arch in ("sm_80", "sm_90", "gfx942"):
    for job in quantized.jobs(arch, report.Job):
        kind = job.form.split("_")[0]
        if kind in ("w8a8", "w4") and job.tile.block_m >= 128:
            chosen.setdefault((arch, kind), job)
rows = {" ".join(key): report.measure(job) for key, job in chosen.items()}
job = chosen["sm_90", "w8a8"]
print(json.dumps({
    "rows": rows,
    "worse": report.regressions(list(rows.values()), golden.read()),
    "floating": report.verdict(job, rows["sm_90 w8a8"] | {"wgmma": 0}, 232448),
    "whole": [quantized.WHOLE_COUNTS["wgmma"], report.COUNTS["wgmma"]],
}))
"""


@pytest.fixture(scope="module")
def quantised() -> dict:
    done = _run("-c", QUANTISED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_quantised_products_use_the_matrix_units_for_whole_numbers(quantised: dict) -> None:
    rows = quantised["rows"]
    assert len(rows) == 6
    assert {row["verdict"] for row in rows.values()} == {"ok"}
    for arch, column in (("sm_80", "mma"), ("sm_90", "wgmma"), ("gfx942", "mfma")):
        assert rows[f"{arch} w8a8"][column] > 0  # IMMA, IGMMA, v_mfma_i32 only: see WHOLE_COUNTS
        assert rows[f"{arch} w4"][column] > 0
    assert quantised["worse"] == []


@pytest.mark.slow
def test_gate_sees_an_int8_product_without_its_instruction(quantised: dict) -> None:
    assert quantised["floating"] == "no wgmma"
    assert quantised["whole"] == ["IGMMA", "HGMMA|IGMMA|QGMMA"]


def _golden(kernels: tuple[str, ...], **wanted: str) -> list[dict[str, str]]:
    with GOLDEN.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] in kernels]
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


@pytest.mark.parametrize("kernel", ["low_rank_product", "block_product", "block_samples"])
@pytest.mark.parametrize(
    ("arch", "column"),
    [
        ("sm_80", "mma"),
        ("sm_86", "mma"),
        ("sm_89", "mma"),
        ("sm_90", "wgmma"),
        ("sm_100", "tcgen05"),
        ("sm_120", "mma"),
        ("gfx942", "mfma"),
        ("gfx950", "mfma"),
    ],
)
def test_low_rank_and_block_sparse_products_use_the_matrix_units(
    arch: str, column: str, kernel: str
) -> None:
    """In the committed table, which the slow suite compiles anew."""
    rows = _golden((kernel,), arch=arch, dtype="bf16")
    assert len(rows) >= 2
    for row in rows:
        short = row["tile"].startswith("(32,")  # 32 rows go by mma.sync everywhere
        assert int(row["mma" if short and arch[:2] == "sm" else column]) > 0, row
        if arch[:2] == "sm" and "loose" not in row["form"]:
            assert int(row["cp_async"]) > 0, row
    whole = _golden((kernel,), arch=arch)
    assert {row["verdict"] for row in whole} == {"ok"}
    assert {row["spill_bytes"] for row in whole} == {"0"}
    assert {row["atomics"] for row in whole} == {"0"}


@pytest.mark.parametrize(
    ("arch", "kernel", "unit", "copies"),
    [
        ("sm_80", "gemm", "mma", "cp_async"),
        ("sm_86", "gemm", "mma", "cp_async"),
        ("sm_89", "gemm", "mma", "cp_async"),
        ("sm_90", "gemm", "wgmma", "cp_async"),
        ("sm_90", "gemm_persistent", "wgmma", "tma"),
        ("sm_100", "gemm", "tcgen05", "cp_async"),
        ("sm_100", "gemm_persistent", "tcgen05", "tma"),
        ("sm_120", "gemm", "mma", "cp_async"),
        ("sm_120", "gemm_persistent", "mma", "tma"),
        ("gfx942", "gemm", "mfma", None),
        ("gfx950", "gemm", "mfma", None),
    ],
)
def test_dense_products_use_the_matrix_units_and_the_copies_of_the_device(
    arch: str, kernel: str, unit: str, copies: str | None
) -> None:
    """In the committed table. float32 has a matrix unit as tf32, on CDNA also as it is."""
    rows = _golden((kernel,), arch=arch)
    assert {row["verdict"] for row in rows} == {"ok"}
    assert {row["spill_bytes"] for row in rows} == {"0"}
    orders = {"nt", "nn", "tn", "gated"}
    aligned = [r for r in rows if r["form"].partition("_")[2] in ("", "rows", "even", "wide")]
    assert {row["form"].partition("_")[0] for row in aligned} == orders
    assert {row["dtype"] for row in aligned} == {"bf16", "f16", "f32"}
    for row in aligned:
        if row["dtype"] != "f32" or row["precision"] == "tf32" or unit == "mfma":
            short = row["tile"].startswith("(32,") and arch[:2] == "sm"
            assert int(row["mma" if short else unit]) > 0, row
        if copies is not None:
            assert int(row[copies]) > 0, row


def test_the_persistent_form_takes_no_atomic_but_to_publish_its_maps() -> None:
    rows = _golden(("gemm_persistent",))
    assert {row["atomics"] for row in rows} == {"2"}
    assert {row["arch"] for row in rows} == {"sm_90", "sm_100", "sm_120"}


PLANTED = """
import json
from bigops.kernels.common.tiles import TileConfig
from tests.kernels.gpu_report import report

spilling = report.Job("sm_80", "gemm", "nt", "bf16", TileConfig(128, 128, 32, 8, 4, 4, 1), "gelu")
# by 16 bytes, and by none without --regAllocOptLevel=2, which triton gives ptxas
slightly = TileConfig(128, 64, 32, 8, 8, 3, 2)
slightly = report.measure(report.Job("sm_100", "gemm", "tn", "f32", slightly, "none"))
greedy = report.Job("sm_80", "gemm", "nn", "bf16", TileConfig(128, 128, 64, 8, 8, 8, 1), "none")
broken = report.Job("sm_80", "gemm", "nt", "bf16", TileConfig(128, 96, 32, 8, 4, 4, 1), "gelu")
job = next(job for job in report.quick_jobs() if job.arch == "sm_90")
row = report.measure(job)
without = row | {"atomics": 0}
amd = next(job for job in report.quick_jobs() if job.arch == "gfx942")
scratch = dict.fromkeys(report.FACTS, 0) | {"mfma": 1, "local": 1}
blocks = next(j for j in report.sparse.jobs("sm_90", report.Job) if j.kernel == "block_samples")
ranks = next(j for j in report.low_rank.jobs("sm_80", report.Job) if "parts" in j.form)
lost = [row | {"wgmma": 0}, row | {"programs_per_sm": 0}, row | {"activation": "new"}]
print(json.dumps({
    "spilling": report.measure(spilling)["verdict"],
    "slightly": [slightly[name] for name in ("spill_bytes", "local", "verdict")],
    "local": report.verdict(job, row | {"local": 1}, 232448),
    "scratch": [report.verdict(amd, scratch | {"local": n}, 65536) for n in (0, 1)],
    "greedy": report.measure(greedy)["verdict"],
    "broken": report.measure(broken)["verdict"],
    "sound": report.verdict(job, row, 232448),
    "no wgmma": report.verdict(job, row | {"wgmma": 0}, 232448),
    "atomics": report.verdict(job, row | {"atomics": 3}, 232448),
    "no tma": report.verdict(job, row | {"tma": 0}, 232448),
    "blocks": [report.verdict(blocks, without | {"wgmma": n}, 232448) for n in (0, 1)],
    "ranks": [report.verdict(ranks, without | {"mma": 1, "cp_async": n}, 232448) for n in (0, 1)],
    "same": report.regressions([row], [row]),
    "lost": [report.regressions([bad], [row]) for bad in lost],
}))
"""


@pytest.fixture(scope="module")
def planted() -> dict:
    done = _run("-c", PLANTED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_gate_passes_a_sound_row(planted: dict) -> None:
    assert planted["sound"] == "ok"
    assert planted["same"] == []


@pytest.mark.slow
def test_gate_sees_spills(planted: dict) -> None:
    assert "spills" in planted["spilling"]


@pytest.mark.slow
@of_the_table
def test_gate_sees_spills_that_only_the_flags_of_triton_make(planted: dict) -> None:
    spilled, instructions, said = planted["slightly"]
    assert spilled == 16
    assert instructions == 4
    assert said == "spills 16 bytes; uses local memory by 4 instructions"


@pytest.mark.slow
def test_gate_sees_local_memory_that_no_spill_explains(planted: dict) -> None:
    assert planted["local"] == "uses local memory by 1 instructions"
    assert planted["scratch"] == ["ok", "uses local memory by 1 instructions"]


@pytest.mark.slow
def test_gate_sees_too_much_shared_memory(planted: dict) -> None:
    assert "shared memory" in planted["greedy"]


@pytest.mark.slow
def test_gate_sees_a_config_that_does_not_compile(planted: dict) -> None:
    assert "Error" in planted["broken"]


@pytest.mark.slow
def test_gate_sees_a_missing_matrix_instruction_and_atomics(planted: dict) -> None:
    assert planted["no wgmma"] == "no wgmma"
    assert planted["atomics"] == "atomics"
    assert planted["no tma"] == "no tma"
    assert planted["blocks"] == ["no wgmma", "ok"]
    assert planted["ranks"] == ["no cp_async", "ok"]


@pytest.mark.slow
def test_comparison_with_the_golden_table_sees_what_is_worse(planted: dict) -> None:
    wgmma, programs, unknown = planted["lost"]
    assert "wgmma" in wgmma[0]
    assert "programs_per_sm" in programs[0]
    assert "not in the golden table" in unknown[0]


@pytest.mark.slow
def test_the_report_fails_on_a_worse_table(tmp_path: Path) -> None:
    header, *rows = GOLDEN.read_text().splitlines()
    doctored = tmp_path / "golden.csv"
    doctored.write_text(header + "\n")
    assert rows
    done = _run(REPORT, "--quick", "--arch", "sm_80", "--check", str(doctored))
    assert done.returncode == 1
    assert "not in the golden table" in done.stderr
