#!/bin/sh
# Sets up and runs every check: lint, format, tests. Arguments go to pytest:  sh tests/run.sh -k launchers
set -eu
cd -- "$(dirname -- "$0")/.."

python=$(sh demo/setup.sh dev)

failed=0
"$python" -m ruff check . || failed=1
"$python" -m ruff format --check . || failed=1
"$python" -m pytest "$@" || failed=1
exit "$failed"
