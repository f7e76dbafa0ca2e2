"""Train DiaNA: what shell/pretrain.sh and shell/finetune.sh start. All flags: python main/train/train.py --help"""

import sys

from diana.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
