#!/usr/bin/env bash
# tests/fuzz/run.sh [SECONDS [FOLDER]]: fuzzes the loader, the tokenizer and the chat templates, each for a third of
# SECONDS (600), and prints what libFuzzer counted. Needs clang and its run-time library. FOLDER (build/fuzz) keeps
# programs and inputs, so that a later run goes on from there. Exit 1 on a finding, whose input is then named.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-600} folder=${2:-build/fuzz}
mkdir -p "$folder"

compile() {
  clang++ -std=c++20 -O1 -g -Wall -Wextra -I. -Itests/fuzz "$@" -lpcre2-8
}
compile tests/fuzz/seeds.cpp -o "$folder/seeds"
"$folder/seeds" "$folder/inputs"

failed=0
for target in model tokenizer chat; do
  program="$folder/fuzz_$target"
  compile -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all "tests/fuzz/fuzz_$target.cpp" -o "$program"
  limit=4096
  [[ $target == model ]] && limit=131072
  log="$folder/$target.log" code=0
  # The harness itself limits the processor time of an input; -timeout is for one that never ends, on a stalled machine.
  "$program" -max_total_time=$((seconds / 3)) -max_len=$limit -timeout=150 -rss_limit_mb=2048 \
      -print_final_stats=1 -artifact_prefix="$folder/finding-$target-" "$folder/inputs/$target" >"$log" 2>&1 || code=$?
  found="no finding"
  if [[ $code != 0 ]]; then
    found="ended with code $code, see $log" failed=1
    grep -aE 'FINDING|ERROR|runtime error|Test unit written|interrupted' "$log" >&2 || true
  fi
  executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  coverage=$(grep -aoE 'cov: [0-9]+ ft: [0-9]+ corp: [0-9]+' "$log" | tail -1)
  echo "fuzz_$target: $((seconds / 3)) s, ${executions:-0} executions, $coverage: $found"
done
exit $failed
