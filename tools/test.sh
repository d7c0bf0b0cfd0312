#!/usr/bin/env bash
# Sets everything up, then checks the code and runs the tests and the comparison with the reference.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh cpu,export,compare,bench,test,docs
# Builds engines without a GPU where it can be installed; its tests are skipped elsewhere.
tools/setup.sh tensorrt-rtx || echo "the extra tensorrt-rtx cannot be installed here: its tests are skipped"
PATH=$PWD/.venv/bin:$PATH
# Several test processes at once: one thread each.
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== documentation"
sphinx-build -W --keep-going -q docs "$work/site"
echo "== pytest"
# By file: what a file's tests share is made once.
python -m pytest -q --numprocesses=logical --maxprocesses=4 --dist=loadfile -m "not slow and not gpu"

compare() {
    echo "== compare $1 with $2"
    dipgo-export --model "$1" --schedule "dipgo_deploy/assets/schedules/$2.json" --engine-dir "$work/$2"
    dipgo-compare --engine-dir "$work/$2"
}
compare fashion-sd fashion-sd-ddim50
compare fashion-dit fashion-dit-uniform5
