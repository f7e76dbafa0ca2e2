"""One process of a run, as run.py starts it; also works alone, or under torchrun and Slurm.

python3 Retrieval.py --config configs/cuhk.yaml --task cuhk --output_dir out/ft_cuhk --checkpoint data/checkpoint/pretrain.pth

All flags: python3 Retrieval.py --help
"""

import sys

from mra.cli import retrieval_main

if __name__ == "__main__":
    sys.exit(retrieval_main())
