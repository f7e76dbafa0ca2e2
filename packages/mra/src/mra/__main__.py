"""`python -m mra`: one process of a run, as `mra-run` starts it where there is no `Retrieval.py`."""

import sys

from mra.cli import retrieval_main

if __name__ == "__main__":
    sys.exit(retrieval_main())
