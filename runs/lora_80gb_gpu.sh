#!/usr/bin/env bash
# Qwen3.5-9B on one 80 GB GPU: an adapter of rank 64 learns, the weights stay in bf16. Needs peft.
#   runs/lora_80gb_gpu.sh train.jsonl                    # flags of train_cdrl.py may follow, such as --merge
# Memory, computed by --dry_run, not yet measured: 51 GiB. With --model Qwen/Qwen3-VL-8B-Instruct: 52 GiB.
# With --model google/gemma-4-E4B-it: 41 GiB.
set -euo pipefail
data=${1:?give a .jsonl file of questions}
python train_cdrl.py --model Qwen/Qwen3.5-9B --clip openai/clip-vit-large-patch14-336 \
    --data "$data" --clip_cache runs/clip_maps --lora_rank 64 --lora_alpha 64 --group_size 8 \
    --batch_size 4 --micro_batch 2 --scale_questions 64 --max_new_tokens 1024 --lr 1e-5 --steps 500 \
    --save_every 50 --keep 1 --output runs/qwen35_9b_lora "${@:2}"
