"""`python -m dp_gen.assemble`: the same as `dp-pack`."""

import sys

from dp_gen.pack import main

if __name__ == "__main__":
    sys.exit(main())
