#!/usr/bin/env bash
# Qwen2.5-VL-7B-Instruct on several nodes of eight 80 GB GPUs, weights and state spread over all of them. On every node:
#   NODES=2 HEAD=host-of-the-first-node:29500 runs/several_nodes.sh train.jsonl
# Memory for 2 nodes, computed by --dry_run, not yet measured: 28 GiB a GPU, and on each node 124 GiB of the CPU's memory
# while eight ranks read the model. The nodes share the file system of --output.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600      # Ctrl-C: time for the step under way and its checkpoint
data=${1:?give a .jsonl file of questions}
nodes=${NODES:?how many nodes}
torchrun --nnodes "$nodes" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "${HEAD:?host:port of the first node}" \
    --rdzv-id cdrl train_cdrl.py --model Qwen/Qwen2.5-VL-7B-Instruct --clip openai/clip-vit-large-patch14-336 \
    --data "$data" --clip_cache runs/clip_maps --shard fsdp --group_size 4 \
    --batch_size $((16 * nodes)) --micro_batch 1 --scale_questions 64 --max_new_tokens 1024 --lr 1e-6 --steps 500 \
    --save_every 50 --keep 1 --output runs/qwen7b_nodes "${@:2}"
