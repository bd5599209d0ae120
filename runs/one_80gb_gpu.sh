#!/usr/bin/env bash
# Qwen2.5-VL-3B-Instruct on one 80 GB GPU, full fine-tuning with all of its state on the GPU.
#   runs/one_80gb_gpu.sh train.jsonl
# Memory, computed by --dry_run, not yet measured: 72 GiB. For 7B add --model Qwen/Qwen2.5-VL-7B-Instruct --offload: 21 GiB on the
# GPU, 154 GiB in the CPU's memory.
set -euo pipefail
data=${1:?give a .jsonl file of questions}
python train_cdrl.py --model Qwen/Qwen2.5-VL-3B-Instruct --clip openai/clip-vit-large-patch14-336 \
    --data "$data" --clip_cache runs/clip_maps --group_size 4 --batch_size 2 --micro_batch 1 \
    --scale_questions 64 --max_new_tokens 1024 --lr 1e-6 --steps 500 --save_every 50 --keep 1 --output runs/qwen3b "${@:2}"
