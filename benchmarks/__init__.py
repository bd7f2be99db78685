"""What things cost, measured: each module is a command."""

import erlib  # noqa: F401  (says what to do where this Python lacks the packages)
