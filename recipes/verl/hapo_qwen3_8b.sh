#!/usr/bin/env bash
# HAPO on DAPO-Math-17k from Qwen/Qwen3-8B-Base on verl, with the settings of the paper.
# Responses up to 12288 tokens, of which the last 4096 are punished for their length. The authors used 64 GPUs:
# NNODES=8.
# Hardware: as written, 4 nodes of 8 GPUs with 80 GB; not run so far. What one GPU changes: the table in paper.sh.
# Command: bash recipes/verl/hapo_qwen3_8b.sh [overrides of verl], on the head node of the Ray cluster
#          NNODES=1 GPUS=1 bash recipes/verl/hapo_qwen3_8b.sh
# Accuracy afterwards, with N the last global step:
#   python -m verl.model_merger merge --backend fsdp --target_dir runs/verl_hapo_qwen3_8b/model \
#     --local_dir runs/verl_hapo_qwen3_8b/global_step_N/actor
#   hapo eval --model runs/verl_hapo_qwen3_8b/model --preset paper \
#     --benchmarks aime24 aime25 amc math500 olympiadbench minerva_math
export NAME=hapo_qwen3_8b MODEL=Qwen/Qwen3-8B-Base RESPONSE=12288 OVERLONG=4096 TP=1
exec bash "$(dirname "$0")/paper.sh" "$@"
