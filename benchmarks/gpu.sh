#!/usr/bin/env bash
# All that needs a CUDA GPU, in the order of its worth, each part within its own time:
#
#   benchmarks/gpu.sh OUT [CAMVID]     # a folder for logs; the folder of CamVid, for the last part
#   benchmarks/gpu.sh OUT --smoke      # on a CPU, a few steps of each part: whether the script runs
#
#   part      at most  what
#   tests        150 s  tests that are skipped without a GPU (those of 200 steps a network: SSASEG_PARITY=1 make parity)
#   bf16, fp16   90 s   1,000 steps of the demo each; the run ends with an error at a value that is not finite
#   step         90 s   benchmarks/step.py: the step of ssa against linear
#   networks     90 s   benchmarks/networks.py: latency of four networks, eager, bfloat16 and compiled
#   camvid       rest   camvid-seaformer_s-ssa for LAST seconds (default 60), then its score
#
# The times are limits, not measurements: no part has run on a GPU yet. PYTHON is the interpreter of an environment
# with ssaseg and pytest (default .venv/bin/python).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?give a folder for the logs}
camvid=${2:-}
python=${PYTHON:-.venv/bin/python}
device=cuda steps=1000 quick=() models=(--model seaformer_b --model segnext_t --model cgrseg_b --model segformer_b0)
[ "$camvid" = --smoke ] && device=cpu steps=3 quick=(--smoke) models=() camvid=
mkdir -p "$out"
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  [ "$code" = 0 ] || [ "$name,$code" = camvid,124 ] || failed=1 # that training is stopped by its time
  echo "$name: exit code $code after $((SECONDS - began)) s; $(tail -n 1 "$out/$name.log")"
}

if [ "$device" = cuda ]; then
  part tests 150 "$python" -m pytest -q -m gpu -k "not 200_steps" tests
else
  part tests 150 "$python" -m pytest -q -m gpu tests/scoring
fi
for amp in bf16 fp16; do
  [ "$device" = cpu ] && [ "$amp" = fp16 ] && continue # a CPU trains in bfloat16 only
  part "$amp" 90 "$python" -m ssaseg train demo "train.amp=$amp" "train.steps=$steps" optim.warmup=2 \
    "train.eval_every=$steps" data.synthetic.val=4 --device "$device" --out "$out/run-$amp"
done
part step 90 "$python" benchmarks/step.py --device "$device" "${quick[@]}"
part networks 90 "$python" benchmarks/networks.py --device "$device" "${models[@]}" "${quick[@]}"
if [ -n "$camvid" ]; then
  part camvid "${LAST:-60}" "$python" -m ssaseg train camvid-seaformer_s-ssa "data.root=$camvid" train.amp=bf16 \
    train.save_every=100 --device "$device" --out "$out/run-camvid"
  part score 60 "$python" -m ssaseg eval "$out/run-camvid/last.safetensors" --device "$device"
fi
exit "$failed"
