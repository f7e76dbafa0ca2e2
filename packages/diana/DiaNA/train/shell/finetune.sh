#!/usr/bin/env bash
# Stage 2: fine-tune on ChatPedes, from what stage 1 left in work_dirs/pretrain.
#
#   cd DiaNA/train
#   bash shell/finetune.sh
#
# Every variable below can be set from outside, and what follows the script's name is appended to the flags (the last
# value of a flag counts). GPUS is the most that are used; with fewer in the machine fewer take part, with none the CPU
# does.

set -euo pipefail

# The released choice; a number of GPUS set from outside refers to all the GPUs of the machine.
[ -n "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2,3}
GPUS=${GPUS:-4}
BATCH_SIZE=${BATCH_SIZE:-32}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$(pwd)"
export MASTER_PORT=${MASTER_PORT:-34230}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
export LAUNCHER=${LAUNCHER:-pytorch}

OUTPUT_DIR=${OUTPUT_DIR:-'work_dirs/finetune'}
PRETRAINED=${PRETRAINED:-'work_dirs/pretrain'}
VISION_PRETRAINED=${VISION_PRETRAINED:-'<Swin Transformer Root>/swinv2-base-patch4-window12-192-22k'}
LLAMA_PRETRAINED=${LLAMA_PRETRAINED:-'<Llama-3.2 Root>/Llama-3.2-1B'}
CONFIG_DIR=${CONFIG_DIR:-'configs'}

exec "${PYTHON:-python}" -m diana.launch \
  --nnodes="${NNODES}" \
  --node_rank="${NODE_RANK}" \
  --master_addr="${MASTER_ADDR}" \
  --nproc_per_node="${GPUS}" \
  --master_port="${MASTER_PORT}" \
  main/train/train.py \
  --vision_pretrained "${VISION_PRETRAINED}" \
  --llama_pretrained "${LLAMA_PRETRAINED}" \
  --config_dir "${CONFIG_DIR}" \
  --pretrained "${PRETRAINED}" \
  --output_dir "${OUTPUT_DIR}" \
  --overwrite_output_dir True \
  --enable_refiner True \
  --enable_sdm True \
  --num_query 16 \
  --sim_type "avg" \
  --drop_path_rate 0.2 \
  --dataset_name "chatpedes" \
  --max_seq_length 400 \
  --mask_probability 0.15 \
  --enable_random_turn True \
  --force_image_size 384 192 \
  --pad_to_max_length True \
  --version "customized" \
  --dataloader_num_workers 8 \
  --bf16 True \
  --num_train_epochs 10 \
  --per_device_train_batch_size "${BATCH_SIZE}" \
  --gradient_accumulation_steps 1 \
  --evaluation_strategy "no" \
  --save_strategy "epoch" \
  --learning_rate 1e-5 \
  --weight_decay 0.05 \
  --warmup_steps 50 \
  --lr_scheduler_type "cosine" \
  --logging_steps 10 \
  --log_level "error" \
  --do_train True \
  --optim "adamw_torch" \
  --adam_beta1 0.9 \
  --adam_beta2 0.999 \
  --report_to "none" \
  --deepspeed "zero_stage3_config.json" \
  "$@"
