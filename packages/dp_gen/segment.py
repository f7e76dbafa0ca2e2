"""Make a training folder from a data set's images and captions, from this folder.

python segment.py \\
  --annotations CUHK-PEDES/reid_raw.json \\
  --image_root CUHK-PEDES/imgs \\
  --output_dir {DATASET_PATH}

All flags: python segment.py --help
"""

import sys

from dp_gen.cli import segment_main

if __name__ == "__main__":
    sys.exit(segment_main())
