#!/usr/bin/env bash
# Qwen3.5-9B on eight 80 GB GPUs, full fine-tuning, bf16, 2 questions a GPU.
#   runs/eight_gpus_qwen35.sh train.jsonl                # flags of train_cdrl.py may follow
# Memory, computed by --dry_run, not yet measured: 47 GiB a GPU. With --model Qwen/Qwen3-VL-8B-Instruct: 39 GiB.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600      # Ctrl-C: time for the step under way and its checkpoint
data=${1:?give a .jsonl file of questions}
torchrun --standalone --nproc-per-node 8 train_cdrl.py --model Qwen/Qwen3.5-9B \
    --clip openai/clip-vit-large-patch14-336 --data "$data" --clip_cache runs/clip_maps --shard fsdp \
    --group_size 4 --batch_size 16 --micro_batch 1 --scale_questions 64 --max_new_tokens 1024 --lr 1e-6 --steps 500 \
    --save_every 50 --keep 1 --output runs/qwen35_9b "${@:2}"
