#!/usr/bin/env bash
# Checks the GPU side of saeforge on a machine with one NVIDIA GPU, in under nine minutes, and writes a dated report:
#     bash scripts/gpu_check.sh                  # further arguments go to scripts/gpu_check.py (--help lists them)
#     bash scripts/gpu_check.sh --wheels DIR --out DIR
#
# Needs Python (3.11 or later) with torch of CUDA and triton. Nothing is downloaded: what is missing beside them is taken
# from the wheels in DIR, which a machine with a package index fills by
#     pip download --no-deps --only-binary=:all: --python-version 3.12 -d DIR NAME...
# PYTHON chooses the interpreter. Exit code 1 if any part failed; the report says which and why.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
