#!/usr/bin/env bash
# What only a GPU can show, in stages that are useful alone, from a checkout on a CUDA machine; thirty minutes in all.
#
#   asv_benchmarks/first_light.sh STAGE [FOLDER]
#
#   1  build, and the first calls: each regime of the kernels in a process of its own      3 minutes
#   2  tests: all that are marked `gpu`                                                    8
#   3  speed: GB/s beside the copy and PyTorch, with "mean" and "none", and host time      4
#   4  why: what ncu says of the kernels of rows                                           3
#   5  regimes: other numbers of threads and blocks for a row                              4
#   6  sanitizers: memcheck, racecheck and initcheck, at the same time                     8
#
# Results are written to FOLDER as they come (asv_benchmarks/results/first_light). Needs CuPy for the machine's CUDA, the
# build's requirements and pytest, hypothesis, mpmath, ml_dtypes, array-api-strict; PyTorch, to compare with.
set -uo pipefail
cd "$(dirname "$0")/.."
stage=${1:?which stage: 1 to 6}
folder=$(realpath -m "${2:-asv_benchmarks/results/first_light}")
mkdir -p "$folder"
export PYTHONUNBUFFERED=1 XCE_TORCH_FALLBACK=0
log() { tee "$folder/$1.log"; }

case $stage in
1)
  { nvidia-smi; pip install --no-build-isolation --no-deps -Csetup-args=-Dlevels=v3 . &&
    timeout 240 python asv_benchmarks/gpu_smoke.py; } 2>&1 | log 1-smoke
  ;;
2)
  workers=$(python -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
  # shellcheck disable=SC2086
  timeout 540 python -m pytest -m gpu -q -ra $workers --junitxml="$folder/2-tests.xml" 2>&1 | log 2-tests
  ;;
3)
  timeout 280 python asv_benchmarks/gpu.py --budget 200 --json "$folder/3-speed.json" 2>&1 | log 3-speed
  ;;
4)
  timeout 240 ncu --set full --kernel-name rows --launch-count 24 --force-overwrite --export "$folder/4-why" \
    python asv_benchmarks/gpu_smoke.py profile 2>&1 | log 4-run
  ncu --import "$folder/4-why.ncu-rep" --page details 2>&1 | log 4-why
  ;;
5)
  for shape in 32768x256 32768x1024 32768x4096 32768x16384 32768x65536 8192x262144; do
    timeout 60 python asv_benchmarks/gpu.py --regimes --shapes "$shape" --dtypes bfloat16
  done 2>&1 | log 5-regimes
  ;;
6)
  for tool in memcheck racecheck initcheck; do
    timeout 540 compute-sanitizer --tool "$tool" --error-exitcode 1 python -m pytest -q tests/test_gpu.py -k sanitize \
      > "$folder/6-$tool.log" 2>&1 &
  done
  wait
  tail -n 3 "$folder"/6-*.log
  ;;
*)
  echo "first_light.sh: stage '$stage' is unknown: expected 1 to 6" >&2
  exit 2
  ;;
esac
