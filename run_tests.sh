#!/usr/bin/env bash
# Runs the tests, in two processes (arguments go to pytest; the slow ones: ./run_tests.sh -m slow; in one: -n 0).
. "$(dirname "$0")/scripts/environment.sh"
cd "$ROOT"
# What is optional and small is tested, too; where it cannot be had, its tests skip.
"$PYTHON" scripts/install.py embeddings >>data/runs/install.log || true
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# Two processes of tests and all that they start share the cores: threads that wait for one another shall not keep one.
export OMP_WAIT_POLICY=PASSIVE
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
