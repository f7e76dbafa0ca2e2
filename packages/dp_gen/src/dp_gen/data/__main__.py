"""`python -m dp_gen.data ROOT`: check a training folder."""

import sys

from dp_gen.data.check import main

if __name__ == "__main__":
    sys.exit(main())
