#!/usr/bin/env bash
# HAPO on DAPO-Math-17k from meta-llama/Llama-3.1-8B-Instruct on verl, with the settings of the paper.
# Responses up to 4096 tokens; the overlong punishment is off, as in the authors' scripts for LLaMA.
# Hardware: as written, 4 nodes of 8 GPUs with 80 GB; not run so far. What one GPU changes: the table in paper.sh.
# Command: bash recipes/verl/hapo_llama3.1_8b.sh [overrides of verl], on the head node of the Ray cluster
#          NNODES=1 GPUS=1 bash recipes/verl/hapo_llama3.1_8b.sh
# Accuracy afterwards, with N the last global step:
#   python -m verl.model_merger merge --backend fsdp --target_dir runs/verl_hapo_llama3.1_8b/model \
#     --local_dir runs/verl_hapo_llama3.1_8b/global_step_N/actor
#   hapo eval --model runs/verl_hapo_llama3.1_8b/model --preset paper \
#     --benchmarks aime24 aime25 amc math500 olympiadbench minerva_math
export NAME=hapo_llama3.1_8b MODEL=meta-llama/Llama-3.1-8B-Instruct RESPONSE=4096 OVERLONG=0 TP=1
exec bash "$(dirname "$0")/paper.sh" "$@"
