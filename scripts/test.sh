#!/usr/bin/env bash
# Runs every check: formatting, lint, types, tests. From anywhere:
#     bash scripts/test.sh              # further arguments go to pytest, for example: bash scripts/test.sh -k registry
#
# Makes its own environment in .venv-test from the exact set in constraints.txt, and uses it again as long as that set and
# pyproject.toml stay the same. PYTHON chooses the interpreter (3.11 or later). Needs no network but the package index, and
# that only for the install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
VENV=.venv-test
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

stamp="$("$PYTHON" - <<'EOP'
import hashlib, pathlib, sys
if sys.version_info < (3, 11):
    sys.exit(f"scripts/test.sh: needs Python 3.11 or later, {sys.executable} is {sys.version.split()[0]}; set PYTHON=...")
text = b"".join(pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(text + sys.version.encode()).hexdigest())
EOP
)"
imports="import hypothesis, jsonargparse, lightning, mypy, pytest, saeforge, torch, transformers, wandb, webdataset"
if [[ "$(cat "$VENV/stamp" 2>/dev/null || true)" == "$stamp" ]] && (cd / && "$OLDPWD/$VENV/bin/python" -c "$imports"); then
  echo "== environment: $VENV is up to date"
else
  echo "== environment: making $VENV"
  rm -rf "$VENV"
  "$PYTHON" -m venv "$VENV"
  # torch first: its wheel is the large one, and a failure shows before everything else is fetched.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
  echo "$stamp" > "$VENV/stamp"
fi
# Our own plugins are installed as anyone's are; saeforge-log-relu, the README's example, is left to its test.
plugins=(plugins/*/src/..)
if [[ -e "${plugins[0]}" && "$(cat plugins/*/pyproject.toml)" != "$(cat "$VENV/plugins" 2>/dev/null || true)" ]]; then
  echo "== environment: plugins"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    "${plugins[@]/#/--editable=}"
  cat plugins/*/pyproject.toml > "$VENV/plugins"
fi
export PATH="$PWD/$VENV/bin:$PATH"

failed=()
check() { # check NAME COMMAND...: all run, so that one report shows everything that is wrong
  local name="$1"
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "pytest" pytest -q -m 'not slow and not gpu' "$@"

if ((${#failed[@]})); then
  echo "== FAILED: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
  exit 1
fi
echo "== all checks passed"
