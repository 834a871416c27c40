#!/bin/bash
# The lean kernels on a GPU, the cheapest and most telling steps first, at most eight minutes on an H100. A step that
# fails or hangs does not stop the others.
#
#   [OUT=folder] [PYTHON=python] bash benchmarks/gpu_plan.sh [--tiny]
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python}
OUT=${OUT:-benchmarks/results/gpu_plan}
mkdir -p "$OUT"
failed=0

step() {  # seconds it may take, name, command
    local limit=$1 name=$2 started=$SECONDS
    shift 2
    [ "${!#}" = --tiny ] && limit=600 # the interpreter's time is nobody's
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    grep -a "^$name: \|passed\|failed" "$OUT/$name.log"
    echo "$name: exit $status after $((SECONDS - started)) s"
    [ $status -eq 0 ] || failed=1
}

for entry in correct:75 small:30 large:45 kernels:20 yardstick:30 classes:30 small32:25 large32:30 tilings:65; do
    name=${entry%:*}
    step "${entry#*:}" "$name" "$PYTHON" benchmarks/gpu_plan.py "$name" --out "$OUT" "$@"
done
# Each width and dtype is compiled anew, which takes most of the time.
if [ "$1" != --tiny ]; then
    at_once=$("$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 8")
    step 130 tests "$PYTHON" -m pytest -q -p no:cacheprovider -m "not long" $at_once tests/contrast/lean_cases.py
fi
exit $failed
