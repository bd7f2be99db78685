"""Ports of the tests' own, for each process that runs them."""

from __future__ import annotations

import os

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Which of the processes that share the tests this is."""
BASE_PORT = int(os.environ.get("ERLIB_TEST_PORT", "27000")) + 2000 * WORKER
"""Another ERLIB_TEST_PORT lets two runs go side by side."""
METRICS_PORT = BASE_PORT + 490
