#!/usr/bin/env bash
# first_run.sh - on a GPU machine, inside the unpacked kit (pack.sh): checks first, then times, in fifteen minutes.
#
#   bash kit/tests/gpu/first_run.sh [--minutes N] [--only STEP,...] [--out FOLDER]
#
# Every result is in FOLDER (default: gpu-results here) as soon as its step ends: STEP.log, summary.md, the tables. So
# nothing is lost where the machine is taken away in the middle. A step gets at most its own limit and what is left of the
# minutes (15), and is left out where that is less than it needs. One that fails makes the exit status 1; the others run.
#
#   smoke      a text on the GPU and on the CPU: equal             kernels   every kernel against cpu/reference.h
#   times      each kernel alone, beside the ceilings              models    whole models and laws (test_gpu.cpp)
#   laws       the program twice, and K = L: equal bits            hf        logits beside Hugging Face's
#   memcheck, racecheck, synccheck   of compute-sanitizer: with models, laws and hf, all at the same time
#   bench, bench32, bench128, tokens128   Llama-3.1-8B at 2K and 8K, at 32K, at 128K: full depth and speed
#   rivals     PyTorch's attention and products; Llama-3.1-8B in transformers
#   profile    what limits the three main kernels, by Nsight Compute
set -uo pipefail
minutes=15 out=$PWD/gpu-results
wanted=smoke,kernels,models,laws,hf,memcheck,racecheck,synccheck,times,bench,rivals,bench32,profile,bench128,tokens128
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=$2; shift 2 ;;
    --only) wanted=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    *) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.."
if ! card=$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null) ||
  [ -z "$card" ]; then
  echo "gpu-kit: nvidia-smi finds no GPU; this kit is for a machine with one" >&2
  exit 1
fi
# cuBLAS of the CUDA toolkit, or the one PyTorch brings; linked beside our own libraries, so that Python keeps its own.
if [ ! -e lib/libcublas.so.13 ]; then
  for folder in /usr/local/cuda/lib64 /usr/local/cuda*/targets/x86_64-linux/lib \
    "$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null)/cu13/lib"; do
    [ -e "$folder/libcublas.so.13" ] && ln -sf "$folder"/libcublas{,Lt}.so.13 lib/ && break
  done
fi
missing=$(ldd bin/* 2>&1 | grep -E 'not found' | sort -u)
if [ -n "$missing" ]; then
  printf 'gpu-kit: the programs cannot start here (they need %s):\n%s\n' "$(cat needs)" "$missing" >&2
  exit 1
fi

export SPEED=$PWD/bin/speed TESTS=$PWD/bin/tests SPEED_TEST_SEED=${SPEED_TEST_SEED:-$(($(date +%s) % 100000))}
export OMP_NUM_THREADS=$(nproc) out
rm -f "$out/failed"
{ printf '# First run on a GPU\n\n%s; commit %s; seed %s\n\n| step | result | seconds |\n|---|---|---|\n' \
  "${card%%$'\n'*}" "$(cat commit)" "$SPEED_TEST_SEED"; } | tee "$out/summary.md"

# step NAME NEEDS LIMIT COMMAND...: seconds. The last line it prints is its result; status 3 means skipped.
step() {
  local name=$1 needs=$2 limit=$3 began=$SECONDS left=$((minutes * 60 - SECONDS)) code result
  shift 3
  [[ ,$wanted, == *,$name,* ]] || return 0
  if [ "$left" -lt "$needs" ]; then
    result="left out: $left s are left, it needs $needs" code=3
  else
    timeout -k 5 $((left < limit ? left : limit)) "$@" >"$out/$name.log" 2>&1
    code=$?
    result=$(grep -vE '^[[:space:]=]*$' "$out/$name.log" | tail -n1 | tr '|' '/' | cut -c1-100)
    case $code in
      0) result="passed: $result" ;;
      3) result="$result" ;;
      124 | 137) result="FAILED: no end after $((SECONDS - began)) s: $result" && touch "$out/failed" ;;
      *) result="FAILED ($code): $result" && touch "$out/failed" ;;
    esac
  fi
  echo "| $name | $result | $((SECONDS - began)) |" | tee -a "$out/summary.md"
  case $result in FAILED*) tail -n 25 "$out/$name.log" ;; esac
}

smoke() {
  local text
  text=$("$SPEED" generate -m models/small.safetensors --device cuda --chat -p "$1" -n 12) || return
  [ "$text" = "$("$SPEED" generate -m models/small.safetensors --device cpu --chat -p "$1" -n 12)" ] ||
    { echo "the GPU answers otherwise than the CPU: $text"; return 1; }
  echo "$text" | head -n1
}
sanitize() {  # only our kernels: of cuBLAS's it reports errors that are none
  local tool
  tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  [ -x "$tool" ] || { echo "skipped: compute-sanitizer is not installed"; return 3; }
  "$tool" --tool "$1" --kernel-regex kns=5speed --error-exitcode 99 "$TESTS" "[gpu]~[model]"
}
export -f smoke sanitize

question="Feta is a barber. Pale has a lamp. Kara has a book. The code word is resane. What is Feta?"
bench() { "$SPEED" bench --device cuda --shape llama-3.1-8b --policy full,speed -o md --record "$out/$1.json" "${@:2}"; }
profile() {  # of times: the last of the runs at 8,192 slots, and the largest matrix of a token
  local ncu kernel skip
  ncu=$(command -v ncu || echo /usr/local/cuda/bin/ncu)
  [ -x "$ncu" ] || { echo "skipped: ncu is not installed"; return 3; }
  for kernel in prefill_hopper:15 decode_attention:40 matvec:396; do
    "$ncu" --clock-control none -k "regex:${kernel%:*}" --launch-skip "${kernel#*:}" -c 1 --kill yes --section SpeedOfLight \
      --section MemoryWorkloadAnalysis --section WarpStateStats --section Occupancy --section SchedulerStats \
      bin/times || return
  done
}
export -f bench profile
check() { python3 tests/gpu/check.py --minutes 2 --out "$out/check-$1" --seed "$SPEED_TEST_SEED" --only "$2"; }
export -f check
# A wrong barrier shows as a hang: the first steps have short limits.
step smoke 5 60 bash -c 'smoke "$1"' - "$question"
step kernels 5 90 "$TESTS" "[gpu]~[model]" -d yes
# Nothing is timed in these, so they share the GPU.
OMP_NUM_THREADS=3
step models 10 90 "$TESTS" "[model]" -d yes &
step laws 20 90 bash -c 'check laws repeat,laws' &
step hf 30 90 bash -c 'check hf hf' &
for tool in memcheck racecheck synccheck; do step $tool 20 90 bash -c "sanitize $tool" & done
wait
OMP_NUM_THREADS=$(nproc)
step times 15 120 bin/times "$out/times"
step bench 30 180 bash -c 'bench bench -p 2048,8192 -n 32 --depth 0,2048,8192 --k 24,16 -r 3'
step rivals 20 90 python3 tests/gpu/rivals.py "$out/rivals"
step bench32 30 90 bash -c 'bench bench32 -p 32768 -n 32 --depth 32768 --k 24,16 -r 2'
step profile 20 60 bash -c profile
# A prompt of 128K takes about 20 s at full depth; each is run once uncounted and once counted.
step bench128 80 150 bash -c 'bench bench128 -p 131000 -n 0 --k 24 -r 1'
step tokens128 80 150 bash -c "bench tokens128 -p '' -n 32 --depth 131000 --k 24 -r 1"
for table in times rivals bench bench32 bench128 tokens128; do [ -f "$out/$table.log" ] && { echo; cat "$out/$table.log"; }; done
echo "gpu-kit: $SECONDS s; results in $out"
[ ! -e "$out/failed" ]
