"""`python -m mra.dad`: the same as `mra-dad`, in a form that torchrun can start."""

import sys

from mra.cli import dad_main

if __name__ == "__main__":
    sys.exit(dad_main())
