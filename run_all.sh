#!/usr/bin/env bash
# Runs the notebooks, in order, for a profile; see ./run_all.sh --help.
. "$(dirname "$0")/scripts/environment.sh"
exec "$PYTHON" "$ROOT/scripts/run_all.py" "$@"
