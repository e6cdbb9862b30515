#!/usr/bin/env bash
# bash docs/make_figures.sh [NAME…]: make the pictures of docs/figures and the tables of docs/data again, and say in
# docs/data/provenance.csv from which commit, on which processor, in how many minutes. --list prints name, files, minutes,
# command; --cheap makes all that takes ten minutes at most; --notebooks executes the notebooks in place.
# PYTHON: the interpreter (default: python). SMOLLM2, PROMPTS: what `gravlens fetch` brought, for the real model.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONPATH=$PWD:$PWD/analyses:$PWD/tests
exec "${PYTHON:-python}" docs/make_figures.py "$@"
