#!/usr/bin/env bash
# Tests marked `gpu` and all benchmarks, from a bare checkout, without installing anything:
#
#     bash benchmarks/gpu.sh [FOLDER]        # default: benchmarks/results; PYTHON=... picks the interpreter
#
# Writes <device>_<date>.md, .json and a plot to FOLDER. Ends within 9 minutes: a part that runs out of time is stopped
# and named in the page. Needs torch, triton, numpy, pytest and pytest-benchmark, and matplotlib for the plot; a test
# file whose other imports are missing is reported as failed and does not stop the rest. Packages to compare with are
# measured where they can be imported. Exit code: 0 when every test passed and every benchmark ran.
#
# Most of the time goes into compiling kernels, one core each. So the tests run in several processes, and beside them
# others run every benchmark that compiles something, once and without a clock, to fill the caches of Triton and
# torch.compile on disk. Only then does anything get timed, alone on the machine.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-benchmarks/results}
python=${PYTHON:-python3}
budget=${BUDGET:-520}      # seconds in all; the limits below add up to 515
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TQDM_DISABLE=1
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
shards=1 warmers=0
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then shards=8 warmers=4; fi

# Tests, and caches filled beside them: 175 s.
# Only folders with such tests, which a fixture in a conftest.py may mark: the others may import packages that this
# machine lacks.
mapfile -t folders < <(grep -rlE 'mark\.gpu\b' tests --include='*.py' | xargs -n 1 dirname | sort -u)
mapfile -t files < <(find "${folders[@]}" -name 'test_*.py' | sort -u)
tests=() reports=() jobs=()
for i in $(seq $shards); do
  tests+=("$work/tests.$i.xml")
  part 175 "$python" -m pytest -q -p benchmarks.harness.shard --shard "$i/$shards" -m gpu \
    --continue-on-collection-errors --tb=short --junitxml="$work/tests.$i.xml" "${files[@]}" \
    > "$work/tests.$i.log" 2>&1 &
  jobs+=($!)
done
large='131k or 262k or 1M'  # batches that compile nothing of their own
for i in $(seq $warmers); do
  # A sixth of the memory each: the tests need some too. What fails here fails again below, and is reported there.
  TORCHINDUCTOR_COMPILE_THREADS=2 part 175 "$python" -m pytest -q -p benchmarks.harness.shard \
    --shard "$i/$warmers" --memory-share 0.167 --benchmark-disable \
    -k "(ours or kv_fused or compile or cublas or peer) and not ($large)" \
    benchmarks/slot_attention/bench_slot_attention.py \
    benchmarks/contrastive/bench_contrastive_loss.py benchmarks/contrastive/bench_sigmoid_loss.py \
    > "$work/warm.$i.log" 2>&1 &
done
# Counts bytes between two processes on the CPU: no clock to disturb.
part 175 "$python" -m benchmarks.contrastive.traffic --json "$work/contrastive_traffic.json" \
  > "$work/traffic.log" 2>&1 &
traffic=$!
for i in $(seq $shards); do
  wait "${jobs[i - 1]}"
  status=$? lines=3
  [ $status -eq 0 ] || [ $status -eq 5 ] || code=1 lines=200
  tail -n $lines "$work/tests.$i.log"
done
wait "$traffic" || { code=1; tail -n 20 "$work/traffic.log"; }
wait
for i in $(seq $warmers); do echo "caches $i/$warmers: $(tail -n 1 "$work/warm.$i.log")"; done
echo "gpu.sh: tests done after $SECONDS s"

# bench NAME SECONDS FILE [PYTEST ARGUMENTS]: one timed part.
bench() {
  local name=$1 limit=$2; shift 2
  reports+=("$work/$name.json")
  part "$limit" "$python" -m pytest -q "$@" --benchmark-json="$work/$name.json" --junitxml="$work/$name.xml" \
    --benchmark-quiet --tb=short || code=1
  echo "gpu.sh: $name done after $SECONDS s"
}
# Our kernels in a process of their own: one that breaks the CUDA context takes no baseline along.
bench slot_attention_baselines 95 benchmarks/slot_attention/bench_slot_attention.py -k 'not ours and not kv_fused'
bench slot_attention_ours 90 benchmarks/slot_attention/bench_slot_attention.py -k 'ours or kv_fused'
bench contrastive_loss_ours 70 \
  benchmarks/contrastive/bench_contrastive_loss.py benchmarks/contrastive/bench_sigmoid_loss.py -k ours
bench contrastive_loss_others 60 \
  benchmarks/contrastive/bench_contrastive_loss.py benchmarks/contrastive/bench_sigmoid_loss.py -k 'not ours'
bench decode 25 benchmarks/dataloading/bench_decode.py
reports+=("$work/contrastive_traffic.json")

"$python" -m benchmarks.report --out "$out" --tests "${tests[@]}" -- "${reports[@]}" || code=1
exit $code
