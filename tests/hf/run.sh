#!/usr/bin/env bash
# The live comparison with Hugging Face. `make test-hf` calls it with the cache folder. The first run makes a virtual
# environment there, which takes about two minutes and 6 GB; most of that is torch.
# `run.sh CACHE SCRIPT ARGUMENTS...` runs that one Python script in the virtual environment instead.
set -euo pipefail
cache=$1
export SPEED_CACHE=$cache
[ -e "$cache/smollm2-135m-instruct.safetensors" ] || ./run.sh info >/dev/null
python3 -c 'import venv, ensurepip' 2>/dev/null || {
  echo "tests/hf: python3-venv is missing; install it (apt-get install python3-venv) and run again" >&2
  exit 1
}
stamp=$(sha256sum tests/hf/requirements.txt | cut -c1-16)
venv=$cache/hf-$stamp
if [ ! -e "$venv/done" ]; then
  echo "tests/hf: making a virtual environment in $venv; this takes about two minutes and 6 GB" >&2
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r tests/hf/requirements.txt
  touch "$venv/done"
fi
[ $# -lt 2 ] || exec "$venv/bin/python" "${@:2}"
for test in tests/test_export.py tests/test_adapt_data.py tests/hf/test_tokenizer.py tests/hf/test_logits.py \
  tests/hf/test_perplexity.py tests/hf/test_importance.py tests/hf/test_trace.py; do
  echo "== $test"
  "$venv/bin/python" "$test"
done
