#!/usr/bin/env bash
# Sets everything up and runs the main job on a built-in model: shipped schedule -> export -> run -> a picture, and the
# speed-up that came out. Arguments go to tools/demo.py (tools/demo.sh --help).
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh cpu,export
exec .venv/bin/python -m tools.demo "$@"
