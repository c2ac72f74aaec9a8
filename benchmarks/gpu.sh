#!/usr/bin/env bash
# Tests marked `gpu` and all benchmarks, from a bare checkout, without installing anything:
#
#     bash benchmarks/gpu.sh [FOLDER]        # default: benchmarks/results; PYTHON=... picks the interpreter
#
# Writes <device>_<date>.md and .json to FOLDER. Ends within 9 minutes: a part that runs out of time is stopped and named
# in the page. Needs torch, triton, numpy, pytest and pytest-benchmark; a test file whose other imports are missing is
# reported as failed and does not stop the rest. Exit code: 0 when every test passed and every benchmark ran.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-benchmarks/results}
python=${PYTHON:-python3}
budget=${BUDGET:-520}      # seconds in all
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TQDM_DISABLE=1
unset TRITON_INTERPRET     # compile the kernels

"$python" -c 'import numpy, pytest, pytest_benchmark, torch, triton' || {
  echo "gpu.sh: $python lacks one of numpy, pytest, pytest-benchmark, torch, triton (see above)" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"

# part SECONDS COMMAND...: run within SECONDS or what is left of the budget. SIGINT lets pytest write what it has.
part() {
  local left=$((budget - SECONDS)) limit=$1; shift
  [ "$left" -gt 5 ] || { echo "gpu.sh: no time left for: $*"; return 124; }
  timeout --signal=INT --kill-after=10 "$((limit < left ? limit : left))" "$@"
}

code=0
# Only files with such tests: the others may import packages that this machine lacks.
mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py')
if [ ${#files[@]} -gt 0 ]; then
  part 240 "$python" -m pytest -q -m gpu --continue-on-collection-errors --junitxml="$work/tests.xml" "${files[@]}"
  status=$?; [ $status -eq 0 ] || [ $status -eq 5 ] || code=1
fi

reports=()
for file in benchmarks/bench_*.py; do
  name=$(basename "$file" .py)
  reports+=("$work/$name.json")
  part 240 "$python" -m pytest -q "$file" --benchmark-json="$work/$name.json" --benchmark-columns=median,iqr,rounds || code=1
done

"$python" benchmarks/report.py --out "$out" --tests "$work/tests.xml" "${reports[@]}" || code=1
exit $code
