#!/usr/bin/env bash
# Usage: tools/setup.sh EXTRAS [FOLDER CONSTRAINTS]
# Makes the environment FOLDER (.venv; Python 3.11 or newer, $PYTHON names another interpreter) and installs this checkout
# into it, editable, with EXTRAS (as in "cpu,export") at the versions of the file CONSTRAINTS (constraints.txt). Does
# nothing when that is done already.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=$1
venv=${2:-.venv}
constraints=${3:-constraints.txt}

recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [ ! -x "$venv/bin/python" ]; then
    python=
    for candidate in ${PYTHON:-python3.11 python3 python}; do
        if recent "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: ${PYTHON:-python3}: Python 3.11 or newer is needed; install it, or name one with PYTHON=..." >&2
        exit 2
    fi
    "$python" -m venv "$venv"
fi
if ! recent "$venv/bin/python"; then
    echo "error: $venv holds a Python older than 3.11: remove that folder and run this again" >&2
    exit 2
fi

done_mark=$venv/installed-$(cat "$constraints" pyproject.toml | cksum | cut -d ' ' -f 1)
for part in ${extras//,/ }; do
    if ! grep -qsx "$part" "$done_mark"; then
        echo "installing into $venv: $extras (a few minutes the first time)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".[$extras]"
        printf '%s\n' ${extras//,/ } >>"$done_mark"
        break
    fi
done
