"""Evaluate a trained model on ITCPR: the paper's command, run from packages/fafa.

python inference_fafa.py \\
  --exp-dir output/cpr/FAFA_experiment \\
  --model-name tuned_recall_at1_step.pt \\
  --itcpr-root /path/to/ITCPR \\
  --batch-size 256

All flags: python inference_fafa.py --help
"""

import sys

from fafa.cli import infer_main

if __name__ == "__main__":
    sys.exit(infer_main())
