"""Train Diverse Person: the paper's command, run from this folder.

CUDA_VISIBLE_DEVICES=0,1 accelerate launch \\
  --mixed_precision=bf16 \\
  train.py \\
  --pretrained_model_hf runwayml/stable-diffusion-v1-5 \\
  --dataset_name {DATASET_PATH} \\
  --logging_dir {LOG_PATH} \\
  --output_dir {OUTPUT_PATH} \\
  --max_train_steps 30000 \\
  ...

The whole command and all flags: python train.py --help
"""

import sys

from dp_gen.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
