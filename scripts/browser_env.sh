#!/usr/bin/env bash
# Gets a Chromium and playwright, the two things that tests of pages need, and runs these tests:
#     bash scripts/browser_env.sh              # after scripts/test.sh, whose environment .venv-test it uses
#
# On Debian and Ubuntu the browser is their package `chromium` (with fonts for many scripts); elsewhere install Chromium or
# Chrome as your system does and name it: SAEFORGE_BROWSER=/path/to/chrome bash scripts/browser_env.sh
# playwright only drives the browser; its own downloads are not used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-test
[[ -x "$VENV/bin/python" ]] || { echo "$0: no $VENV here; run scripts/test.sh first" >&2; exit 1; }
found="${SAEFORGE_BROWSER:-$(command -v chromium chromium-browser google-chrome google-chrome-stable | head -1 || true)}"
if [[ -z "$found" ]]; then
  command -v apt-get > /dev/null || { echo "$0: no Chromium here; install it, or name one in SAEFORGE_BROWSER" >&2; exit 1; }
  echo "== installing chromium"
  sudo=(); [[ "$(id -u)" == 0 ]] || sudo=(sudo)
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" apt-get install -y -qq --no-install-recommends chromium fonts-inter fonts-noto-core
  found="$(command -v chromium)"
fi
"$VENV/bin/python" -c "import playwright" 2> /dev/null ||
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check playwright
echo "== browser: $("$found" --version)"
SAEFORGE_BROWSER="$found" "$VENV/bin/python" -m pytest -q tests/test_report_browser.py "$@"
