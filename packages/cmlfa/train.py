"""Train CMLFA: the paper's command, run from this folder.

CUDA_VISIBLE_DEVICES=0 \\
python train.py \\
--name cmlfa \\
--img_aug \\
--batch_size 64 \\
--MLM \\
--loss_names 'sdm+mlm+id+itc' \\
--dataset_name 'CUHK-PEDES' \\
--root_dir 'your dataset root dir' \\
--num_epoch 150 \\
--id_loss_weight 0.5 \\
--mlm_loss_weight 0.5

Several GPUs: torchrun --nproc_per_node=4 train.py (the same flags). All flags: python train.py --help
"""

import sys

from cmlfa.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
