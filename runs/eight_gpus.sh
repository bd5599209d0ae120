#!/usr/bin/env bash
# The paper's run: Qwen2.5-VL-7B-Instruct on eight 80 GB GPUs, full fine-tuning, bf16, 4 pairs a question, 2 questions a GPU.
#   runs/eight_gpus.sh train.jsonl                       # flags of train_cdrl.py may follow; --recipe ours for ours
# Memory, computed by --dry_run, not yet measured: 36 GiB a GPU, 124 GiB of the CPU's memory while eight ranks read the model.
# A checkpoint: 116 GB of disk. lr and number of steps are not published; these are ours.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600      # Ctrl-C: time for the step under way and its checkpoint
data=${1:?give a .jsonl file of questions}
torchrun --standalone --nproc-per-node 8 train_cdrl.py --recipe paper --model Qwen/Qwen2.5-VL-7B-Instruct \
    --clip openai/clip-vit-large-patch14-336 --data "$data" --clip_cache runs/clip_maps --shard fsdp \
    --group_size 4 --batch_size 16 --micro_batch 1 --scale_questions 64 --max_new_tokens 1024 --lr 1e-6 --steps 500 \
    --save_every 50 --keep 1 --output runs/qwen7b "${@:2}"
