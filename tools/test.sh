#!/usr/bin/env bash
# Sets everything up, then checks the code and runs the tests and the comparison with the reference.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh cpu,export,video,compare,ray,bench,serve,test,docs
tools/setup.sh openvino || echo "the extra openvino cannot be installed here: its tests are skipped"
# Builds engines without a GPU where it can be installed; its tests are skipped elsewhere.
tools/setup.sh tensorrt-rtx || echo "the extra tensorrt-rtx cannot be installed here: its tests are skipped"
PATH=$PWD/.venv/bin:$PATH
# Several test processes at once: one thread each.
export OMP_NUM_THREADS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Runs functions side by side, each on a core of its own; prints what each printed, one after the other. Fails where one
# does.
together() {
    local name status=0
    declare -A processes
    for name; do
        "$name" >"$work/$name.log" 2>&1 &
        processes[$name]=$!
    done
    for name; do
        wait "${processes[$name]}" || status=$?
        cat "$work/$name.log"
    done
    return "$status"
}

types() {
    echo "== mypy"
    mypy
}
documentation() {
    echo "== documentation"
    sphinx-build -W --keep-going -q docs "$work/site"
}

echo "== ruff"
ruff check .
ruff format --check .
together types documentation
echo "== pytest"
# By file: what a file's tests share is made once.
python -m pytest -q --numprocesses=logical --maxprocesses=4 --dist=loadfile -m "not slow and not gpu"

lowest=.venv/lowest
if .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then
    PYTHON=.venv/bin/python tools/setup.sh cpu,test-base "$lowest" constraints-lowest.txt
else
    echo "lowest versions of the base dependencies: not tested, they are not made for this Python, only for 3.11 and 3.12"
    lowest=
fi
lowest_versions() {
    [ -n "$lowest" ] || return 0
    echo "== lowest versions of the base dependencies"
    "$lowest/bin/python" -m pytest -q -m "not slow and not gpu" tests/bundle tests/cli/test_arrays.py \
        tests/cli/test_common.py tests/cli/test_run_command.py tests/runtime/test_loop.py tests/runtime/test_pipeline.py \
        tests/schedule/test_document.py tests/test_argument_types.py
}
compare() {
    echo "== compare $1 with $2"
    dipgo-export --model "$1" --schedule "dipgo_deploy/assets/schedules/$2.json" --engine-dir "$work/$2"
    dipgo-compare --engine-dir "$work/$2"
}
compare_sd() { compare fashion-sd fashion-sd-ddim50; }
compare_dit() { compare fashion-dit fashion-dit-uniform5; }
together lowest_versions compare_sd compare_dit
if [ -n "$lowest" ]; then
    echo "== run with the lowest versions"
    "$lowest/bin/dipgo" run --engine-dir "$work/fashion-sd-ddim50" --prompt "a sneaker" -o "$work/lowest.png"
    "$lowest/bin/dipgo" schedule show "$work/fashion-sd-ddim50/schedule.json"
fi
