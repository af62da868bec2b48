#!/usr/bin/env bash
# The published protocol of SynthSAEBench-16k on one GPU: 4,096 latents, 200 million rows of 1,024, lr 3e-4, bf16, L0 25 and 20,
# for every installed variant, or those named:
#     bash scripts/bench_synthetic_16k.sh --variants '[topk, batchtopk]' --out runs/synthetic-16k
# Further arguments go to `saeforge bench-synthetic` (--help lists them); the same command goes on after an interruption.
# Rows are made by half of the cores beside the GPU (about 30 microseconds of one core each): 16 cores keep up with one.
# A rehearsal of a minute, without a GPU too: --samples 102400 --seeds 1 --l0 '[25]' --precision 32-true
# The published figures to compare with stand in docs/synthetic.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # of each thread that makes rows
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m saeforge.cli.main bench-synthetic --preset 16k "$@"
