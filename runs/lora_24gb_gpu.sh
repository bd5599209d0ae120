#!/usr/bin/env bash
# Qwen3.5-4B on one 24 GB GPU: an adapter of rank 64 learns, the weights stay in bf16. Needs peft.
#   runs/lora_24gb_gpu.sh train.jsonl
# Memory, computed by --dry_run, not yet measured: 19 GiB. Without flash-linear-attention and causal-conv1d its layers run slowly.
set -euo pipefail
data=${1:?give a .jsonl file of questions}
python train_cdrl.py --model Qwen/Qwen3.5-4B --clip openai/clip-vit-large-patch14-336 \
    --data "$data" --clip_cache runs/clip_maps --lora_rank 64 --lora_alpha 64 --activation_checkpointing on --group_size 4 \
    --batch_size 2 --micro_batch 1 --scale_questions 64 --max_new_tokens 1024 --lr 1e-5 --steps 500 \
    --save_every 50 --keep 1 --output runs/qwen35_4b_lora "${@:2}"
