#!/usr/bin/env bash
# Runs the tests (arguments go to pytest; the slow ones: ./run_tests.sh -m slow).
. "$(dirname "$0")/scripts/environment.sh"
cd "$ROOT"
# What is optional and small is tested, too; where it cannot be had, its tests skip.
extras=$("$PYTHON" -c 'import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*extras["envoy"], *extras["embeddings"])')
# shellcheck disable=SC2086 # a list of words
"$PYTHON" -m pip --disable-pip-version-check install -q --no-deps $extras >>data/runs/install.log 2>&1 ||
  echo "$extras: cannot be installed here, see data/runs/install.log" >&2
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
