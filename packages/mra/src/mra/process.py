"""`Retrieval.py` as a module: `python -m mra.process` is what `mra-run` starts where there is no checkout."""

import sys

from mra.cli import retrieval_main

if __name__ == "__main__":
    sys.exit(retrieval_main())
