"""Test a trained model: the paper's command, run from this folder.

python test.py --config_file 'path/to/model_dir/configs.yaml'

All flags: python test.py --help
"""

import sys

from cmlfa.cli import test_main

if __name__ == "__main__":
    sys.exit(test_main())
