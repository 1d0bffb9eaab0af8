#!/usr/bin/env bash
# Everything that needs a GPU, in slices of at most ten minutes, for a machine that may have no network:
#
#   tools/on_gpu.sh build      build into the environment of $PYTHON (wheels that it lacks: folder $WHEELS)
#   tools/on_gpu.sh test       the tests of PART=ops|kernels|driver on the device; all three where PART is not given
#   tools/on_gpu.sh sanitize   compute-sanitizer TOOL=memcheck|racecheck|synccheck over the kernels' tests; memcheck if not given
#   tools/on_gpu.sh bench      operator benchmark; status 3: the time is over, run it again to go on
#
# $PYTHON is the interpreter of an environment that may be written to (python3 -m venv --system-site-packages). Results
# (CSV, JSON, logs) go to $OUT, default build/gpu; the benchmark goes on from what it finds there. $COMMIT names the
# code where git is not at hand.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3} OUT=${OUT:-build/gpu} WHEELS=${WHEELS:-wheels} LIMIT=${LIMIT:-580}
export PYTHONPATH="$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}" ENTRGI_TEST_DEVICE=cuda
mkdir -p "$OUT"

case "${1:-}" in
  build)
    if compgen -G "$WHEELS/*.whl" > /dev/null; then
      "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl || exit 1
    fi
    ENTRGI_CUDA=1 "$PYTHON" -m pip install -v --no-build-isolation --no-deps -e . > "$OUT/build.log" 2>&1 \
      || { tail -n 60 "$OUT/build.log"; exit 1; }
    grep -E 'entrgi: ' "$OUT/build.log"
    "$PYTHON" -m entrgi.cli doctor
    ;;
  test)
    declare -A files=(
      [ops]="tests/ops" [kernels]="tests/kernels"
      [driver]="tests/driver/test_device.py tests/driver/test_guidance.py tests/driver/test_timing.py tests/driver/test_profile.py"
    )
    status=0
    for part in ${PART:-ops kernels driver}; do
      # shellcheck disable=SC2086
      timeout "$LIMIT" "$PYTHON" -m pytest ${files[$part]} --junitxml="$OUT/$part.xml" > "$OUT/$part.log" 2>&1 || status=$?
      echo "== $part: $(tail -n 1 "$OUT/$part.log")"
      grep -E '^(FAILED|ERROR)' "$OUT/$part.log" | head -n 40
    done
    exit "$status"
    ;;
  sanitize)
    tool=${TOOL:-memcheck}
    ENTRGI_KERNEL_PREFIX="compute-sanitizer --tool $tool --error-exitcode 99" \
      timeout "$LIMIT" "$PYTHON" -m pytest tests/kernels -k "not plan and not machine" > "$OUT/$tool.log" 2>&1
    status=$?
    tail -n 5 "$OUT/$tool.log"
    exit "$status"
    ;;
  bench)
    cp "$OUT"/operators_nvidia* benchmarks/results/ 2> /dev/null
    status=0
    "$PYTHON" benchmarks/operators.py --device cuda --resume --time-budget "$((LIMIT - 40))" ${COMMIT:+--commit "$COMMIT"} || status=$?
    cp benchmarks/results/operators_nvidia* "$OUT" 2> /dev/null
    exit "$status"
    ;;
  *)
    sed -n '2,11p' "$0" | cut -c3-
    exit 2
    ;;
esac
