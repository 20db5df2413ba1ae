"""``python -m benchmarks.page``: draw docs/results.md and its pictures again."""

from benchmarks.page.page import main

raise SystemExit(main())
