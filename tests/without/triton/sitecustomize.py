"""With this folder on PYTHONPATH no process finds Triton, as on a machine that has none: ``make test-no-triton``."""

import sys

sys.modules["triton"] = None  # type: ignore[assignment]
