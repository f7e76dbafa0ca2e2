"""`python -m dp_gen.train`: the same program as `train.py` and `dp-train`."""

import sys

from dp_gen.cli import train_main as main

if __name__ == "__main__":
    sys.exit(main())
