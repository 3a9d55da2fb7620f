#!/usr/bin/env bash
# The page of `speed trace --html` in headless Chromium. `make test-page` calls it with the cache folder, in which the
# first run makes a virtual environment of 150 MB for playwright. The browser is Debian's, because playwright's own come
# from a server of their own: install it with ./run.sh test-page. CHROMIUM names another one.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=$1
export CHROMIUM=${CHROMIUM:-/usr/bin/chromium}
[ -x "$CHROMIUM" ] || { echo "tests/page: no browser in $CHROMIUM; ./run.sh test-page installs it" >&2; exit 1; }
venv=$cache/page-$(sha256sum tests/page/requirements.txt | cut -c1-16)
if [ ! -e "$venv/done" ]; then
  mkdir -p "$cache"
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r tests/page/requirements.txt
  touch "$venv/done"
fi
exec "$venv/bin/python" tests/page/test_page.py "${@:2}"
