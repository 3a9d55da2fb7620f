#!/usr/bin/env bash
# `make gpu-check` calls it with the cache folder: check.py, in the virtual environment of the comparison with Hugging
# Face. Where that cannot be made (no network, say), with this machine's Python, which then skips that comparison.
set -euo pipefail
cache=$1
if tests/hf/run.sh "$cache" -c pass; then
  exec tests/hf/run.sh "$cache" tests/gpu/check.py
fi
echo "gpu-check: no virtual environment for Hugging Face; checking all the rest" >&2
export SPEED_CACHE=$cache
exec python3 tests/gpu/check.py
