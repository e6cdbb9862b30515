#!/usr/bin/env bash
# Tests and benchmarks of gravlens on this machine's accelerator, in at most four minutes after the environment is built.
#
#   bash benchmarks/device.sh [--out FOLDER]           an accelerator: a Llama of 1.2 billion random weights in bf16
#   bash benchmarks/device.sh --dry [--out FOLDER]     the same on the CPU with a tiny model
#
# PYTHON (default: python3) is the interpreter that has torch for the device. What it lacks is installed into an
# environment above it: from the folder WHEELS if that is given, else from the package index. Where PYTHON has gravlens
# already, nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} out=. dry=
while [ $# -gt 0 ]; do
    case $1 in
        --dry) dry=1 ;;
        --out) out=$2 && shift ;;
        *) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
    shift
done
mkdir -p "$out"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if ! "$python" -c "import gravlens.cli, pytest, pytest_timeout" 2> /dev/null; then
    "$python" -m venv --system-site-packages "$scratch/venv"
    python=$scratch/venv/bin/python
    if [ -n "${WHEELS:-}" ]; then
        "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
        "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
    else
        "$python" -m pip install --quiet -e . pytest pytest-timeout nnsight peft
    fi
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONPATH=$PWD:$PWD/tests
device=auto size=(--size 1b)
if [ -n "$dry" ]; then
    device=cpu size=(--size tiny --prompts 24 --repeats 1 --steps 2)
fi
export GRAVLENS_TEST_DEVICE=$device
"$python" -m pytest -q -p no:cacheprovider tests/models/test_on_device.py
timeout 200 "$python" benchmarks/device.py --device "$device" "${size[@]}" --out "$out"
