#!/bin/sh
# Sets up and runs every check: lint, format, tests. Arguments go to pytest:  sh tests/run.sh -k launchers
# Tests run in up to four processes;  sh tests/run.sh -n 0 --pdb  stays in one.
set -eu
cd -- "$(dirname -- "$0")/.."

python=$(sh demo/setup.sh dev)
processes=$("$python" -c 'import os; print(min(os.cpu_count() or 1, 4))')

failed=0
"$python" -m ruff check . || failed=1
"$python" -m ruff format --check . || failed=1
# A file's tests stay in one process, which makes their fixtures once; conftest.py has the longest files start first.
"$python" -m pytest -n "$processes" --dist loadfile --no-loadscope-reorder "$@" || failed=1
exit "$failed"
