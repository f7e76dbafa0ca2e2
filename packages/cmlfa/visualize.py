"""Draw what a trained model finds for one caption.

python visualize.py --config_file 'path/to/model_dir/configs.yaml' --query_idx 3900

All flags: python visualize.py --help
"""

import sys

from cmlfa.cli import visualize_main

if __name__ == "__main__":
    sys.exit(visualize_main())
