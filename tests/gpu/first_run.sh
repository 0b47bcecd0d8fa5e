#!/bin/bash
# The first minutes on an H200: OUT=FOLDER bash gpu-first-run/first_run.sh correct|fast
#
# From the root of the tree, on an image with Python 3.12, torch 2.11, CUDA 13.0 and Triton 3.6,
# which is too old: `make gpu-first-run` packs a Triton that serves beside this file. "correct" (at
# most 480 s) asks whether any number is wrong, "fast" (at most 260 s) whether any is slow; bench
# nothing before the numbers are right. The second call finds what the first one built in
# ~/first-run. Exit status: 1 where the first products are wrong or nothing was built, else 0; what
# failed is in the text and in $OUT.
case "${1:-}" in correct | fast) ;; *) echo "first_run.sh: expected correct or fast; got '${1:-}'" >&2; exit 2 ;; esac
[ -d "${OUT:-}" ] || { echo "first_run.sh: OUT: expected a folder; got '${OUT:-}'" >&2; exit 2; }
pack=$(cd "$(dirname "$0")" && pwd)/triton.tar.xz
kept=$HOME/first-run site=$kept/site tree=$kept/tree
mkdir -p "$kept"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 XDG_CACHE_HOME=$kept/cache TRITON_CACHE_DIR=$kept/triton
if [ ! -d "$site/triton" ]; then
  mkdir -p "$site" && tar xJf "$pack" -C "$site" || exit 1
fi
# Triton's own ptxas was left out of the pack: CUDA's serves.
ptxas=$(dirname "$(readlink -f "$(command -v nvcc)")")/ptxas
export TRITON_PTXAS_PATH=$ptxas TRITON_PTXAS_BLACKWELL_PATH=$ptxas PYTHONPATH=$site:$PWD

say() { echo "== $1 $(date +%T)"; }
# run NAME SECONDS COMMAND...: its last lines are shown, all of it is kept
run() {
  local name=$1 seconds=$2
  shift 2
  say "$name"
  timeout "$seconds" "$@" > "$kept/$name.txt" 2>&1
  local status=$?
  tail -"${LINES_SHOWN:-12}" "$kept/$name.txt"
  echo "-- $name: status $status"
}
keep() { tar czf "$OUT/$1.tar.gz" -C "$kept" $(cd "$kept" && ls ./*.txt ./*.csv 2>/dev/null); }
test="python3 -m pytest -q -p no:cacheprovider --tb=line -W ignore"

correct() {
  say start
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  uname -r
  # 0. fail early: one product of each kind of unit
  run smoke 50 python3 - <<'PROGRAM'
import torch, triton, bigops
from bigops.backend import machine
from bigops.kernels import fused_linear
print(torch.__version__, triton.__version__, repr(machine.triton_error()))
for dtype, most in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
    x, w = (torch.randn(r, 512, device="cuda").to(dtype) for r in (300, 768))
    y, truth = fused_linear.forward(x, w)[0].double(), x.double() @ w.double().t()
    error = ((y - truth).norm() / truth.norm()).item()
    print(dtype, error)
    assert error < most
print("smoke passed")
PROGRAM
  grep -q "smoke passed" "$kept/smoke.txt" || return 1
  # 1. beside everything else: the CUDA C++ kernels, in a copy, so that both trees are tried
  (
    rm -rf "$tree" && mkdir "$tree" && tar c --exclude=./build --exclude=./gpu-first-run . |
      tar x -C "$tree" && cd "$tree" && BIGOPS_CUDA=1 BIGOPS_CUDA_ARCHS=90a \
      timeout 300 python3 setup.py -q build_ext --inplace
    echo "status $?"
  ) > "$kept/build.txt" 2>&1 &
  local build=$!
  # 2. what decides most, cheapest first: every PTX wrapper against its twin on the host
  run hostrun 60 $test -m gpu tests/csrc/test_hostrun.py
  # 3. Triton: TMA, the fp8 units, all ops, forward and gradients
  run triton 150 $test -n 7 -m gpu tests/ops/fused_linear/test_triton_persistent.py \
    tests/gpu/test_gpu_values.py tests/ops/fp8_linear/test_triton.py
  # 4. streams, graphs, offsets past 2^31, run to run; every shipped tile runs
  run device 90 $test -n 5 -m gpu tests/gpu/test_gpu_device.py -k "not sanitizer"
  wait $build
  tail -2 "$kept/build.txt"
  # 5. CUDA C++, and the ops that it serves in place of Triton
  cd "$tree" || return 1
  export PYTHONPATH=$site:$tree
  run cuda 90 $test -n 7 -m gpu tests/ops/*/test_cuda*.py tests/gpu/test_gpu_values.py
  # 6. races of the cp.async rings: only where the tool takes the device, which a sandbox may refuse
  LINES_SHOWN=4 run racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 9 \
    $test -m gpu tests/ops/sparse_linear/test_cuda_sparse24.py -k s8-bf16-7
}

fast() {
  # 7. the ceilings, then the dense products against cuBLAS
  LINES_SHOWN=60 run ladder 120 python3 -m bigops.benches.gpu_ladder --csv "$kept/ladder.csv"
  # 8. each op against its rivals, few rounds; in the tree with the CUDA C++ kernels
  cd "$tree" || return 1
  export PYTHONPATH=$site:$tree
  for op in quantized_linear sparse_linear fp8_linear linear_cross_entropy fused_adamw \
    low_rank_linear; do
    LINES_SHOWN=8 run "$op" 35 python3 -m bigops bench --device cuda --op "$op" --quick \
      --pairs 10 --csv "$kept/$op.csv"
  done
}

"$1"
status=$?
keep "$1"
exit $status
