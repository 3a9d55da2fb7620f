#!/usr/bin/env bash
# Runs a command with the package's environment: `hf/run.sh python SCRIPT ...`, `hf/run.sh pytest ...`, `hf/run.sh lm_eval ...`.
# With no command it runs the tests. The environment is made the first time: about four minutes and 7 GB, most of it torch.
# It stands in $SPEED_CACHE (default: ~/.cache/speed), outside this folder.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SPEED_CACHE=${SPEED_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/speed}
python3 -c 'import venv, ensurepip' 2>/dev/null || {
  echo "hf: python3-venv is missing; install it (apt-get install python3-venv) and run again" >&2
  exit 1
}
venv=$SPEED_CACHE/speed-llama-$(sha256sum "$here/requirements.txt" | cut -c1-16)
mkdir -p "$SPEED_CACHE"
exec 9>"$venv.lock"
flock 9  # two of these at once make it once
if [ ! -e "$venv/done" ]; then
  echo "hf: making a virtual environment in $venv: about four minutes and 7 GB" >&2
  rm -rf "$venv"
  python3 -m venv "$venv"
  # requirements.txt is complete, so pip need not resolve (--no-deps): its resolver trips over hashed extras
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --require-hashes -r "$here/requirements.txt"
  touch "$venv/done"
fi
exec 9>&-
export PATH=$venv/bin:$PATH PYTHONPATH=$here/src${PYTHONPATH:+:$PYTHONPATH}
[ $# -gt 0 ] || set -- pytest "$here/tests"
exec "$@"
