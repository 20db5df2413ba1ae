"""``python -m benchmarks.page``: draw docs/results.md, docs/results-history.md and their pictures again."""

from benchmarks.page.page import main

raise SystemExit(main())
