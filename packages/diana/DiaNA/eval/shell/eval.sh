#!/usr/bin/env bash
# Evaluate the fine-tuned model on the test dialogues of ChatPedes.
#
#   cd DiaNA/eval
#   bash shell/eval.sh
#   bash shell/eval.sh --mode all --turn_limit 1 2 3 4 5 -1
#
# PRETRAINED and OUTPUT_DIR can be set from outside; what follows the script's name is appended to the flags (the last
# value of a flag counts).

set -euo pipefail

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

PRETRAINED=${PRETRAINED:-'../train/work_dirs/finetune'}
OUTPUT_DIR=${OUTPUT_DIR:-'work_dirs/finetune'}

exec "${PYTHON:-python}" clip_benchmark/cli.py \
  --pretrained "${PRETRAINED}" \
  --dataset chatpedes \
  --dataset_config_path configs/dataset_config.yaml \
  --batch_size 128 \
  --max_seq_length 400 \
  --turn_limit -1 \
  --mode global \
  --version customized \
  --output_dir "${OUTPUT_DIR}" \
  "$@"
