#!/usr/bin/env bash
# The paper's table: five benchmarks; base, majority, DeepConf, CA-TTS, and after CDRL. See runs/paper_table.md.
#   MODEL=Qwen/Qwen2.5-VL-7B-Instruct TRAINED=runs/qwen7b EXPERT=https://host/v1 EXPERT_MODEL=NAME \
#       runs/paper_table.sh FOLDER
#   MODEL=tiny/base TRAINED=tiny/expert runs/paper_table.sh FOLDER --limit 4      # a trial: the built-in models
# Resumes. RANKS=8 splits the questions over eight GPUs. COST=1 prints what it would cost, and stops. Flags
# behind FOLDER go to eval.py.
set -euo pipefail
folder=$(realpath "${1:?give the folder with the files of the benchmarks; runs/paper_table.md names them}")
shift
flags=("$@")
cd "$(dirname "$0")/.."
model=${MODEL:?name the base model, such as MODEL=Qwen/Qwen2.5-VL-7B-Instruct}
output=${OUTPUT:-runs/paper}
run=(python)
[ "${RANKS:-1}" = 1 ] || run=(torchrun --standalone --nproc-per-node "$RANKS")
flags=(--no-probe --methods greedy,modules --prompt "${PROMPT:-project}" ${COST:+--dry_run} "${flags[@]}")
case $model in
    tiny/*) ;;
    *) flags=(--clip "${CLIP:-openai/clip-vit-large-patch14-336}" --max_new_tokens "${TOKENS:-1024}"
              "${flags[@]}") ;;
esac

files=0
for name in MathVista_MINI MathVision_MINI MathVision MMStar MMMU_DEV_VAL; do
    for file in "$folder/$name".{tsv,json,jsonl,parquet}; do
        [ -f "$file" ] || continue
        files=$((files + 1))
        measure() { "${run[@]}" eval.py --data "$file" --output "$output/$name/$1" "${@:2}" "${flags[@]}"; }
        measure self --model "$model" --expert self
        [ -z "${EXPERT:-}" ] || measure server --model "$model" --expert "$EXPERT" \
            ${EXPERT_MODEL:+--expert_model "$EXPERT_MODEL"}
        [ -z "${TRAINED:-}" ] || measure trained --model "$TRAINED" --expert self
    done
done
[ "$files" -gt 0 ] || { echo "$folder holds none of the files that runs/paper_table.md names" >&2; exit 2; }
[ -n "${COST:-}" ] || python -m utils.paper_table "$output"
