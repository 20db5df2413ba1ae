"""``python -m tokcomp`` is the ``tokcomp`` command."""

import sys

from tokcomp.cli import main

if __name__ == "__main__":
    sys.exit(main())
