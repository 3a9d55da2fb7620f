#!/usr/bin/env bash
# tests/fuzz/run.sh [SECONDS [FOLDER]]: fuzzes the loader for SECONDS (600), and beside it the tokenizer and the chat
# templates for half as long each, then the page of `trace --html` for a tenth, and prints what libFuzzer counted. Needs
# clang and its run-time library. FOLDER (build/fuzz) keeps programs and inputs, so that a later run goes on from there.
# Exit 1 on a finding, whose input is then named and printed.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-600}
export folder=${2:-build/fuzz}
mkdir -p "$folder"

compile() {
  clang++ -std=c++20 -O1 -g -Wall -Wextra -fopenmp -Itests/fuzz "$@" -lopenblas -lpcre2-8
}

# fuzz TARGET SECONDS
fuzz() {
  local target=$1 seconds=$2 limit=4096 code=0 found="no finding" input
  local program="$folder/fuzz_$target" log="$folder/$target.log" prefix="$folder/finding-$target-"
  [[ $target == model ]] && limit=131072
  rm -f "$prefix"*
  compile -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all "tests/fuzz/fuzz_$target.cpp" -o "$program"
  # The harness itself limits the processor time of an input; -timeout is for one that waits for ever.
  "$program" -max_total_time="$seconds" -max_len=$limit -timeout=1200 -rss_limit_mb=2048 -print_final_stats=1 \
      -artifact_prefix="$prefix" "$folder/inputs/$target" >"$log" 2>&1 || code=$?
  if [[ $code != 0 ]]; then
    found="ended with code $code, see $log"
    grep -aE 'FINDING|ERROR|runtime error|interrupted' "$log" >&2 || true
    for input in "$prefix"*; do
      [[ -e $input && $input != *slow-unit* ]] || continue
      printf '%s: get it by "base64 -d | gunzip" of the lines below, try it with %s FILE\n' "$input" "$program" >&2
      gzip -9 <"$input" | base64 -w 120 >&2
    done
  fi
  echo "fuzz_$target: $seconds s," \
      "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log") executions," \
      "$(grep -aoE 'cov: [0-9]+ ft: [0-9]+ corp: [0-9]+' "$log" | tail -1): $found"
  return $((code != 0))
}
export -f compile fuzz

compile tests/fuzz/seeds.cpp -o "$folder/seeds"
"$folder/seeds" "$folder/inputs"
xargs -n 2 -P 2 bash -euo pipefail -c 'fuzz "$@"' fuzz <<<"model $seconds tokenizer $((seconds / 2)) chat $((seconds / 2)) page $((seconds / 10))" ||
  exit 1
