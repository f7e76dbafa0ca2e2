"""`python -m dp_gen.data ROOT`: check a training folder."""

import sys

from dp_gen.cli import check_data_main

if __name__ == "__main__":
    sys.exit(check_data_main())
