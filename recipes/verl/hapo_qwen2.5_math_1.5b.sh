#!/usr/bin/env bash
# HAPO on DAPO-Math-17k from Qwen/Qwen2.5-Math-1.5B on verl, with the settings of the paper.
# Responses up to 10240 tokens, of which the last 4096 are punished for their length. The paper enlarges the
# context of Qwen2.5-Math, whose own is 4096 tokens, to 16k or more.
# Hardware: as written, 4 nodes of 8 GPUs with 80 GB; not run so far. What one GPU changes: the table in paper.sh.
# Command: bash recipes/verl/hapo_qwen2.5_math_1.5b.sh [overrides of verl], on the head node of the Ray cluster
#          NNODES=1 GPUS=1 bash recipes/verl/hapo_qwen2.5_math_1.5b.sh
# Accuracy afterwards, with N the last global step:
#   python -m verl.model_merger merge --backend fsdp --target_dir runs/verl_hapo_qwen2.5_math_1.5b/model \
#     --local_dir runs/verl_hapo_qwen2.5_math_1.5b/global_step_N/actor
#   hapo eval --model runs/verl_hapo_qwen2.5_math_1.5b/model --preset paper \
#     --benchmarks aime24 aime25 amc math500 olympiadbench minerva_math
export NAME=hapo_qwen2.5_math_1.5b MODEL=Qwen/Qwen2.5-Math-1.5B RESPONSE=10240 OVERLONG=4096 TP=1 CONTEXT=16384
exec bash "$(dirname "$0")/paper.sh" "$@"
