"""Pre-train, fine-tune or evaluate MRA: the paper's commands, run from this folder.

python3 run.py --task "sda"  --dist "f4" --output_dir "out/pre_sda"
python3 run.py --task "cuhk" --dist "f4" --output_dir "out/ft_cuhk"   --checkpoint "data/checkpoint/pretrain.pth"
python3 run.py --task "cuhk" --dist "f4" --output_dir "out/eval_cuhk" --checkpoint "data/checkpoint/ft_cuhk.pth" --evaluate

All flags: python3 run.py --help
"""

import sys

from mra.cli import run_main

if __name__ == "__main__":
    sys.exit(run_main())
