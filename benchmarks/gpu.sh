#!/usr/bin/env bash
# Tests marked `gpu` and all benchmarks, from a bare checkout, without installing anything:
#
#     bash benchmarks/gpu.sh [FOLDER]         # kernels; default folder: benchmarks/results; PYTHON=... the interpreter
#     bash benchmarks/gpu.sh [FOLDER] step    # the training step
#
# Two plans, since each ends within 9 minutes: a part that runs out of time is stopped and named in the page. `kernels`
# takes the tests of kernels and the benchmarks of ops and decoding; `step` all other tests (text attention, no host
# waits, compiled blocks, ...) and the benchmark of a training step: options, peers, micro-batches, a batch of 16k.
# Writes <device>_<date>.md (step_<device>_...), .json and a plot to FOLDER. Needs torch, triton, numpy, pytest and
# pytest-benchmark, matplotlib for the plot, and for `step` transformers and tokenizers; a test file whose other imports
# are missing is reported as failed and does not stop the rest. Packages to compare with are measured where they can be
# imported. Exit code: 0 when every test passed and every benchmark ran.
#
# Most of the time goes into compiling kernels, one core each. So the tests run in several processes, and beside them
# others run every benchmark that compiles something, once and without a clock, to fill the caches of Triton and
# torch.compile on disk. Only then does anything get timed, alone on the machine.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-benchmarks/results}
plan=${2:-kernels}
case $plan in kernels | step) ;; *) echo "gpu.sh: $plan is no plan; use kernels or step" >&2; exit 2 ;; esac
python=${PYTHON:-python3}
budget=${BUDGET:-520}      # seconds in all; the limits of each plan below add up to 515
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
# Only files with such tests, which a conftest.py above them may mark: the others may import packages that this machine
# lacks.
gpu_tests() {
  local marking file
  mapfile -t marking < <(grep -rlE 'mark\.gpu\b' tests --include='*.py')
  for file in "${marking[@]}"; do
    case $file in
      */conftest.py) find "${file%/*}" -name 'test_*.py' ;;
      */test_*.py) echo "$file" ;;
    esac
  done | sort -u | if [ "$1" = kernels ]; then grep '^tests/kernels/'; else grep -v '^tests/kernels/'; fi
}
mapfile -t files < <(gpu_tests "$plan")
tests=() reports=() jobs=()
for i in $(seq $shards); do
  tests+=("$work/tests.$i.xml")
  part 175 "$python" -m pytest -q -p benchmarks.harness.shard --shard "$i/$shards" -m gpu \
    --continue-on-collection-errors --tb=short --junitxml="$work/tests.$i.xml" "${files[@]}" \
    > "$work/tests.$i.log" 2>&1 &
  jobs+=($!)
done
large='131k or 262k or 1M'  # batches that compile nothing of their own
share=0.167                 # of the memory, each: the tests need some too
warm=(-k "(ours or kv_fused or compile or cublas or peer) and not ($large)"
  benchmarks/slot_attention/bench_slot_attention.py
  benchmarks/contrastive/bench_contrastive_loss.py benchmarks/contrastive/bench_sigmoid_loss.py)
if [ "$plan" = step ]; then
  warmers=$((warmers / 2)) share=0.3
  warm=(-k 'test_option and compiled' benchmarks/train_step/bench_train_step.py)
fi
for i in $(seq $warmers); do
  # What fails here fails again below, and is reported there.
  TORCHINDUCTOR_COMPILE_THREADS=2 part 175 "$python" -m pytest -q -p benchmarks.harness.shard \
    --shard "$i/$warmers" --memory-share "$share" --benchmark-disable "${warm[@]}" > "$work/warm.$i.log" 2>&1 &
done
# Counts bytes between two processes on the CPU: no clock to disturb.
if [ "$plan" = kernels ]; then
  part 175 "$python" -m benchmarks.contrastive.traffic --json "$work/contrastive_traffic.json" \
    > "$work/traffic.log" 2>&1 &
  traffic=$!
fi
for i in $(seq $shards); do
  wait "${jobs[i - 1]}"
  status=$? lines=3
  [ $status -eq 0 ] || [ $status -eq 5 ] || code=1 lines=200
  tail -n $lines "$work/tests.$i.log"
done
[ "$plan" != kernels ] || wait "$traffic" || { code=1; tail -n 20 "$work/traffic.log"; }
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
kernels_plan() {
# Our kernels in a process of their own: one that breaks the CUDA context takes no baseline along.
bench slot_attention_baselines 95 benchmarks/slot_attention/bench_slot_attention.py -k 'not ours and not kv_fused'
bench slot_attention_ours 90 benchmarks/slot_attention/bench_slot_attention.py -k 'ours or kv_fused'
bench contrastive_loss_ours 70 \
  benchmarks/contrastive/bench_contrastive_loss.py benchmarks/contrastive/bench_sigmoid_loss.py -k ours
bench contrastive_loss_others 60 \
  benchmarks/contrastive/bench_contrastive_loss.py benchmarks/contrastive/bench_sigmoid_loss.py -k 'not ours'
bench decode 25 benchmarks/dataloading/bench_decode.py
reports+=("$work/contrastive_traffic.json")
}
step_plan() {
# What the goals need comes first. A batch of 16k takes 6 s a step at the goal's rate.
bench step_options 150 benchmarks/train_step/bench_train_step.py -k 'test_option or test_peer or test_open_clip'
bench step_batches 120 benchmarks/train_step/bench_train_step.py -k 'test_large or test_micro'
bench step_parts 70 benchmarks/train_step/bench_train_step.py -k 'test_where or test_text or test_demo'
}
"${plan}_plan"
options=()
[ "$plan" = kernels ] || options=(--prefix "${plan}_" --goals train_step)

"$python" -m benchmarks.report --out "$out" "${options[@]}" --tests "${tests[@]}" -- "${reports[@]}" || code=1
exit $code
