"""fp8 products compiled for GPUs that are not here: those of the golden table, and three besides.

sm_89 and sm_120 take the tiles of sm_86, and gfx950 those of gfx942, but have other units for e4m3.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "gpu_report.csv"
# What multiplies e4m3 codes; sm_80 and sm_86 have nothing and multiply them in float16.
COLUMNS = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.mark.parametrize("arch", COLUMNS)
def test_products_of_the_golden_table_use_the_unit_for_e4m3(arch: str) -> None:
    """A row of codes by codes counts instructions for e4m3 alone (CODE_COUNTS), where there are."""
    with GOLDEN.open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["arch"] == arch]
    rows = [row for row in table if row["kernel"] == "fp8_gemm"]
    codes = [row for row in rows if row["form"].startswith("f8a8")]
    assert len(codes) >= 15
    for row in codes:
        short = row["tile"].startswith("(32,")  # 32 rows go by mma.sync
        assert int(row["mma" if short and arch[:2] == "sm" else COLUMNS[arch]]) > 0, row
    for row in rows + [row for row in table if row["kernel"] == "quantize_fp8"]:
        assert (row["verdict"], row["spill_bytes"], row["atomics"]) == ("ok", "0", "0"), row


SCRIPT = """
import json
from tests.kernels.gpu_report import jobs_fp8 as fp8
from tests.kernels.gpu_report import report

rows = []
for arch in ("sm_89", "sm_120", "gfx950"):
    for job in fp8.jobs(arch, report.Job):
        if job.form in ("f8a8_row", "f8a8_block", "f8a8_row_odd", "f8_block") and (
            job.dtype == "bf16" and job.activation == "gelu"
        ):
            rows.append(report.measure(job))
job = next(j for j in fp8.jobs("sm_90", report.Job) if j.form == "f8a8_row")
good = dict.fromkeys(report.FACTS, 0) | {"wgmma": 1}
verdicts = [report.verdict(job, good | {"wgmma": n}, 232448) for n in (1, 0)]
print(json.dumps({
    "rows": rows,
    "verdicts": verdicts,
    "counts": [fp8.CODE_COUNTS["wgmma"], report.COUNTS["wgmma"]],
    "whose": [fp8.by_unit(job), fp8.by_unit(job._replace(arch="sm_80"))],
}))
"""


@pytest.mark.slow
def test_other_devices_and_the_gate() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = found["rows"]
    assert {row["arch"] for row in rows} == {"sm_89", "sm_120", "gfx950"}
    assert len(rows) >= 15
    for row in rows:
        assert row["verdict"] == "ok", row
        assert row["spill_bytes"] == 0, row
        assert int(row["mfma" if row["arch"][:3] == "gfx" else "mma"]) > 0, row
    assert found["verdicts"] == ["ok", "no wgmma"]
    assert found["counts"] == ["QGMMA", "HGMMA|IGMMA|QGMMA"]  # HGMMA would be no fp8 product
    assert found["whose"] == [True, False]
