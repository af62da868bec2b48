#!/usr/bin/env bash
# Makes the environments of the other tools, for tests/test_interop_peers.py and scripts/check_interop.py. From anywhere:
#     bash scripts/interop_environments.sh [FOLDER [TOOL ...]]
#
# TOOL is saelens (with TransformerLens), sparsify or dictionary_learning (with nnsight); default: all three. FOLDER is
# .venv-peers by default; each environment becomes FOLDER/TOOL, one that is whole stays as it is. PYTHON chooses the
# interpreter. The last lines say how to start the checks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
FOLDER="${1:-.venv-peers}"
shift || true
TOOLS=("$@")
if [[ ${#TOOLS[@]} -eq 0 ]]; then TOOLS=(saelens sparsify dictionary_learning); fi

declare -A PACKAGES=(
  [saelens]="sae-lens==6.54.12 transformer-lens<4"
  [sparsify]="eai-sparsify==1.3.3"
  [dictionary_learning]="numpy safetensors einops tqdm nnsight transformers"
)
# Its own requirements pin an nnsight and a torch of years ago, which nothing here uses.
declare -A ALONE=([dictionary_learning]="dictionary-learning==0.1.0")
declare -A IMPORTS=(
  [saelens]="sae_lens, transformer_lens"
  [sparsify]="sparsify"
  [dictionary_learning]="dictionary_learning.dictionary, nnsight"
)

for tool in "${TOOLS[@]}"; do
  if [[ -z "${PACKAGES[$tool]:-}" ]]; then
    echo "interop_environments.sh: $tool is unknown; expected saelens, sparsify or dictionary_learning" >&2
    exit 2
  fi
  python="$FOLDER/$tool/bin/python"
  if [[ -x "$python" ]] && "$python" -c "import ${IMPORTS[$tool]}" 2>/dev/null; then
    echo "== $tool: $FOLDER/$tool is there"
    continue
  fi
  echo "== $tool: making $FOLDER/$tool"
  rm -rf "${FOLDER:?}/$tool"
  "$PYTHON" -m venv "$FOLDER/$tool"
  # torch first, in the version that the tests here run with: a newer one could compute otherwise.
  "$python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  # shellcheck disable=SC2086 # a list of packages
  "$python" -m pip install --quiet --disable-pip-version-check ${PACKAGES[$tool]}
  if [[ -n "${ALONE[$tool]:-}" ]]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps "${ALONE[$tool]}"
  fi
  "$python" -c "import ${IMPORTS[$tool]}"
done

echo "SAEFORGE_PEERS=$FOLDER python -m pytest -m slow tests/test_interop_peers.py"
