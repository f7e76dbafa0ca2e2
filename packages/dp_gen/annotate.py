"""Annotate edited images: the paper's command, run from this folder.

python annotate.py \\
  --origin_path {DATA_PATH} \\
  --output_path {ANNOTATION_JSONL_PATH} \\
  --model "gpt-3.5-turbo" \\
  --TEXT_START 0 \\
  --TEXT_END -1 \\
  --SLICE_STEP 500

All flags: python annotate.py --help
"""

import sys

from dp_gen.cli import annotate_main

if __name__ == "__main__":
    sys.exit(annotate_main())
