#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in under 10 minutes: tests, the copy routes, runs
# of OPT-6.7B with weights of 16 and 4 bits on the host, and what the planner says of
# caches that are moved or attended to there. Runs have the device capped at 16 GB.
#
#     bench/gpu.sh
#
# Results go to $OUT (default bench/results) as JSON; weights, 25 GB of them, to
# $FLEXJAX_CACHE (default ~/.cache/flexjax). $PYTHON is the interpreter (default python3).
# A part that fails or hangs is reported at the end and does not keep the others from
# running; the status is then 1. Without a GPU it is 2.
set -euo pipefail

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
CACHE=${FLEXJAX_CACHE:-$HOME/.cache/flexjax}
TOTAL_S=560 # of all parts; one that is stopped gets 10 s more to end
CAP_BYTES=16000000000
FEW_LAYERS=12 # of 32: for what is opened time and again

stop() {
  echo "error: $*" >&2
  exit 2
}

if ! gpu=$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits 2>/dev/null); then
  stop "there is no NVIDIA GPU here (nvidia-smi names none); run this on a machine with one"
fi
gpu=${gpu%%$'\n'*} # the first of several
gpu_name=${gpu%,*}
gpu_mib=${gpu##*, }
cd "$(dirname "$0")/.."
if ! device=$("$PYTHON" -c 'import jax; print(jax.devices()[0].platform)'); then
  stop "$PYTHON has no working JAX; set PYTHON to an interpreter that has it"
fi
if [[ $device == cpu ]]; then
  stop "JAX sees no GPU, though there is one; install it with \`make setup EXTRAS=dev,cuda\`"
fi

# JAX takes its memory at the start, as a fraction of the GPU's, and then no more.
fraction=$(awk -v cap="$CAP_BYTES" -v mib="$gpu_mib" \
  'BEGIN { f = cap / (mib * 1048576); print (f < 0.95 ? f : 0.95) }')
export FLEXJAX_CACHE=$CACHE
mkdir -p "$OUT" "$CACHE"
logs=$(mktemp -d)
pids=()
finish() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  rm -rf "$logs"
}
trap finish EXIT
failed=()
short_name=$(tr -cs '[:alnum:].' '-' <<<"${gpu_name,,}")
short_name=${short_name%-}
weights=$CACHE/random-opt-6.7b # where bench.run looks for them
few_weights=$weights-$FEW_LAYERS-layers

# limit SECONDS: that, or what is left of the whole.
limit() {
  local left=$((TOTAL_S - SECONDS))
  echo $(($1 < left ? $1 : left))
}

# report NAME STATUS LOG: shows how a part ended.
report() {
  local name=$1 status=$2 log=$3 how="done" lines=15
  if ((status)); then
    how="failed with status $status" lines=60
    if ((status == 124 || status == 137)); then how="out of time"; fi
    failed+=("$name: $how")
  fi
  echo "== $name: $how, $SECONDS s since the start"
  tail -n "$lines" "$log"
}

# part NAME SECONDS COMMAND...: runs a command that may take so long.
part() {
  local name=$1 seconds status=0 log=$logs/part
  seconds=$(limit "$2")
  shift 2
  if ((seconds < 10)); then
    failed+=("$name: not run, for want of time")
    return 1
  fi
  timeout --kill-after=10 "$seconds" "$@" >"$log" 2>&1 || status=$?
  report "$name" "$status" "$log"
  return "$status"
}

# capped NAME SECONDS ARGUMENTS...: the same of Python, with the device capped.
capped() {
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" env XLA_PYTHON_CLIENT_MEM_FRACTION="$fraction" "$PYTHON" "$@"
}

# run NAME NOTE ARGUMENTS...: a run under the cap, whose JSON says what it is.
run() {
  local name=$1 note=$2 json=$OUT/$short_name-$1.json
  shift 2
  capped "$name" 110 -m bench.run "$@" --json "$json" || return 0
  "$PYTHON" - "$json" "$name" "$note" <<'END'
import json, pathlib, sys

path, case, note = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
report = json.loads(path.read_text())
report |= {"case": case, "note": note, "command": "bench/gpu.sh"}
report["model"] = pathlib.PurePath(report["model"]).name
path.write_text(json.dumps(report, indent=1) + "\n")
END
}

echo "$gpu_name with $gpu_mib MiB; the device is capped at $fraction of it"
"$PYTHON" -c 'import jax, jaxlib; print("jax", jax.__version__, "jaxlib", jaxlib.__version__)'

# Weights are written while the tests run, which time nothing; without the GPU, whose
# memory the tests share.
export JAX_PLATFORMS=cpu
timeout --kill-after=10 "$(limit 200)" bash -euc '
  "$0" -m checkpoints_tools.synthesize opt-6.7b "$1"
  "$0" -m checkpoints_tools.convert "$1" "$1-4bit" --weight-bits 4
' "$PYTHON" "$weights" >"$logs/all" 2>&1 &
pids+=($!)
timeout --kill-after=10 "$(limit 200)" "$PYTHON" -m bench.truncated \
  opt-6.7b "$FEW_LAYERS" "$few_weights" >"$logs/few" 2>&1 &
pids+=($!)
unset JAX_PLATFORMS

# Without what keeps files in the checkout, and what xdist makes warn.
pytest=("$PYTHON" -m pytest -q -o cache_dir="$logs/cache" -p no:benchmark)
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  pytest+=(-n 4 --dist loadgroup)
fi
part "tests that need an accelerator" 60 "${pytest[@]}" -m accelerator || true
part "tests of memory and engine" 110 "${pytest[@]}" -m "not accelerator" \
  tests/memory tests/test_stage.py tests/test_engine.py || true

status=0
wait "${pids[0]}" || status=$?
report "weights of OPT-6.7B" "$status" "$logs/all"
status=0
wait "${pids[1]}" || status=$?
report "weights of $FEW_LAYERS layers" "$status" "$logs/few"
pids=()

part "copy routes" 60 "$PYTHON" -m bench.copy_routes \
  --json "$OUT/$short_name-copy-routes.json" || true
for bits in 16 4; do
  folder=$weights few=() name=opt-6.7b-weights-host
  if ((bits == 4)); then
    folder=$weights-4bit few=(--weight-bits 4) name=opt-6.7b-4bit-weights-host
  fi
  run "$name" "device capped at 16 GB" --model "$folder" "${few[@]}" \
    --weights host=1 --kv-cache device=1 --activations device=1 \
    --batch-size 24 --num-batches 1 --prompt-len 512 --gen-len 32 \
    --trace "$OUT/$short_name-$name.trace.json"
done
capped "predictions" 250 -m bench.predictions "$few_weights" \
  --prompt-len 512 --gen-len 12 --json "$OUT/$short_name-predictions.json" || true

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "all done in $SECONDS s; the results are in $OUT"
