"""Evaluate DiaNA: what shell/eval.sh starts. All flags: python clip_benchmark/cli.py --help"""

import sys

from diana.cli import eval_main

if __name__ == "__main__":
    sys.exit(eval_main())
