#!/usr/bin/env bash
# bash docs/first_minutes.sh FOLDER: run the commands of docs/first_minutes.md in FOLDER (created if needed) and print their
# output. Uses the gravlens on PATH.
set -uo pipefail
mkdir -p "$1" && cd "$1" || exit 2
export GRAVLENS_CACHE=$PWD/cache TQDM_DISABLE=1 COLUMNS=118 NO_COLOR=1

try() {
    local start=$SECONDS word line=
    for word in "$@"; do
        case $word in *" "*) word="\"$word\"" ;; esac
        line+=" $word"
    done
    printf '\n$%s\n' "$line"
    "$@" 2>&1 | sed "s|$PWD/||g; s|[[:space:]]*\$||"
    printf '(%d s, exit code %d)\n' "$((SECONDS - start))" "${PIPESTATUS[0]}"
}

try gravlens --help
try gravlens reproduce --out first
try gravlens inspect first/SEQUENCE.toml
try gravlens plan first/SEQUENCE.toml
try gravlens locate first/SEQUENCE.toml --out vrev.safetensors
try gravlens trajectory first/SEQUENCE.toml --out trajectory.csv
try gravlens trajectory first/SEQUENCE.toml --layer 12
try gravlens ablate first/SEQUENCE.toml --layer 2
try gravlens ablate first/SEQUENCE.toml --layer 2 --openings "sorry , i cannot help with that" --out ablation
try gravlens report first
