"""`python -m fafa.syncpr`: the same as `fafa-syncpr`, for torchrun."""

import sys

from fafa.cli import syncpr_main

if __name__ == "__main__":
    sys.exit(syncpr_main())
