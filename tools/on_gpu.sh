#!/usr/bin/env bash
# Everything that needs a GPU, in slices of less than ten minutes, for a machine that may have no network:
#
#   tools/on_gpu.sh build      build into the environment of $PYTHON (wheels that it lacks: folder $WHEELS)
#   tools/on_gpu.sh test       operator, kernel and driver tests on the device
#   tools/on_gpu.sh sanitize   compute-sanitizer over the kernels' tests; ONLY=memcheck|racecheck|synccheck for one tool
#   tools/on_gpu.sh bench      operator benchmark; run it again to go on where the time ended
#
# Results (JSON, CSV, logs) go to $OUT, default build/gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-build/gpu} WHEELS=${WHEELS:-wheels}
export PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}" ENTRGI_TEST_DEVICE=cuda
mkdir -p "$OUT"

case "${1:-}" in
  build)
    if [ -d "$WHEELS" ]; then "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl; fi
    ENTRGI_CUDA=1 "$PYTHON" -m pip install -v --no-build-isolation --no-deps -e . > "$OUT/build.log" 2>&1 \
      || { tail -n 60 "$OUT/build.log"; exit 1; }
    grep -E 'entrgi: ' "$OUT/build.log"
    "$PYTHON" -m entrgi.cli doctor
    ;;
  test)
    "$PYTHON" -m pytest tests/ops tests/kernels tests/driver/test_device.py tests/driver/test_guidance.py tests/driver/test_timing.py \
      --junitxml="$OUT/tests.xml" 2>&1 | tee "$OUT/tests.log" | tail -n 40
    ;;
  sanitize)
    for tool in ${ONLY:-memcheck racecheck synccheck}; do
      echo "== $tool"
      ENTRGI_KERNEL_PREFIX="compute-sanitizer --tool $tool --error-exitcode 99" \
        "$PYTHON" -m pytest tests/kernels -x 2>&1 | tee "$OUT/$tool.log" | tail -n 5
    done
    ;;
  bench)
    # Status 3: the time is over, and what was measured is written; the next call goes on from there. Bring "$OUT" back
    # to benchmarks/results/ where each call starts from a fresh tree.
    status=0
    "$PYTHON" benchmarks/operators.py --device cuda --resume --time-budget 540 || status=$?
    cp benchmarks/results/operators_nvidia* "$OUT"
    exit "$status"
    ;;
  *)
    sed -n '2,9p' "$0" | cut -c3-
    exit 2
    ;;
esac
