#!/usr/bin/env bash
# HAPO on DAPO-Math-17k on stock verl, with the settings of the paper (arXiv 2509.16591): what its six models share.
# The scripts hapo_*.sh set the model and call this one. Not run so far on GPUs; every override is checked against
# verl 0.9.1 (tests/verl/test_recipes.py), and smoke_cpu.sh runs.
#
# Needs: pip install -e ".[verl]" and vLLM 0.32 on every node (docs/verl.md), this repository and its runs/ in a folder
# that all nodes share.
#
#                     4 nodes x 8 GPUs of 80 GB     one GPU of 80 GB: NNODES=1 GPUS=1
#   PROMPTS           512 problems a rollout        64
#   MINI              32 an optimiser step          4         (16 optimiser steps a rollout batch in both)
#   TP                of each model                 1
#   OFFLOAD           False                         True      parameters and optimiser in host memory, 16 bytes a
#                                                             parameter: 25 GB at 1.5B, 130 GB at 8B, 240 GB at 14B
#   GPU_MEMORY        0.7                           0.6       share of the GPU that vLLM may take
# Any of these can be set in the environment. Arguments are further overrides of verl, such as
#   trainer.logger='[console,wandb]'   +hapo.options.components=BCD   +hapo.method=dapo
#
# A cluster: `ray start --head` on one node, `ray start --address=HEAD:6379` on the others, then the script on the head.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${NAME:?run one of recipes/verl/hapo_*.sh}" "${MODEL:?}" "${RESPONSE:?}" "${OVERLONG:?}"
NNODES=${NNODES:-4}
GPUS=${GPUS:-8}
if ((NNODES * GPUS == 1)); then
    PROMPTS=${PROMPTS:-64} MINI=${MINI:-4} TP=1 OFFLOAD=${OFFLOAD:-True} GPU_MEMORY=${GPU_MEMORY:-0.6}
else
    PROMPTS=${PROMPTS:-512} MINI=${MINI:-32} OFFLOAD=${OFFLOAD:-False} GPU_MEMORY=${GPU_MEMORY:-0.7}
fi
PROMPT=1024                   # tokens of a problem, at most
TOKENS=$((PROMPT + RESPONSE)) # of the longest sequence

DATA=${DATA:-$PWD/data/dapo_math}
OUT=${OUT:-$PWD/runs/verl_$NAME}
[[ -f $DATA/train.parquet ]] || python recipes/verl/prepare.py "$DATA" --recipe "recipes/$NAME.yaml"

export VERL_USE_EXTERNAL_MODULES=hapo.verl

ACTOR=actor_rollout_ref.actor
ROLLOUT=actor_rollout_ref.rollout

OVERRIDES=(
    # The method. Its defaults are the paper's: bounds 0.2 and 0.28, rho 0.8, tau 0.1.
    trainer.v1.trainer_mode=hapo
    algorithm.adv_estimator=hapo
    $ACTOR.policy_loss.loss_mode=hapo
    +hapo.method=hapo
    # Workers on other nodes do not inherit the environment of this one.
    +ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=hapo.verl

    # Component A draws from another distribution than the policy: a truncated weight on each token, capped at 2.
    $ROLLOUT.calculate_log_probs=True
    algorithm.rollout_correction.rollout_is=token
    algorithm.rollout_correction.rollout_is_threshold=2.0

    # Dynamic sampling: groups whose answers are all right or all wrong are replaced. No limit of rounds: verl's
    # buffer has none (its max_num_gen_batches is ignored).
    algorithm.filter_groups.enable=True
    algorithm.filter_groups.metric=acc

    # The schedule: 512 problems x 16 answers, used for 16 optimiser steps.
    data.train_batch_size="$PROMPTS"
    $ROLLOUT.n=16
    $ACTOR.ppo_mini_batch_size="$MINI"
    $ACTOR.ppo_epochs=1
    trainer.total_epochs=1

    # The optimiser. verl counts warm-up in rollout batches, as the authors' scripts do; the first trains at 0.
    $ACTOR.optim.lr=1e-6
    $ACTOR.optim.lr_warmup_steps=10
    $ACTOR.optim.weight_decay=0.1
    $ACTOR.grad_clip=1.0
    $ACTOR.use_kl_loss=False
    $ACTOR.entropy_coeff=0

    # Sampling: T_base 1, no top-p, no top-k.
    $ROLLOUT.name=vllm
    $ROLLOUT.temperature=1.0
    $ROLLOUT.top_p=1.0
    $ROLLOUT.top_k=-1
    $ROLLOUT.max_model_len="$TOKENS"
    $ROLLOUT.tensor_model_parallel_size="$TP"
    $ROLLOUT.gpu_memory_utilization="$GPU_MEMORY"

    # The task.
    data.train_files="$DATA/train.parquet"
    data.val_files="$DATA/val.parquet"
    data.max_prompt_length="$PROMPT"
    data.max_response_length="$RESPONSE"
    data.filter_overlong_prompts=True
    reward.custom_reward_function.path="$PWD/recipes/verl/reward.py"

    # The model and its memory: packed micro-batches of at most one longest sequence, two where nothing is kept for
    # a backward pass.
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    $ACTOR.strategy=fsdp2
    $ACTOR.fsdp_config.offload_policy="$OFFLOAD"
    $ACTOR.use_dynamic_bsz=True
    $ACTOR.ppo_max_token_len_per_gpu="$TOKENS"
    $ROLLOUT.log_prob_max_token_len_per_gpu=$((2 * TOKENS))
    $ACTOR.entropy_from_logits_with_chunking=True

    # What is written: every fourth rollout batch a checkpoint, run records beside it. Accuracy is measured afterwards,
    # by `hapo eval`, as the paper does.
    trainer.nnodes="$NNODES"
    trainer.n_gpus_per_node="$GPUS"
    trainer.logger='[console]'
    trainer.project_name=hapo
    trainer.experiment_name="$NAME"
    trainer.default_local_dir="$OUT"
    hydra.run.dir="$OUT/hydra"
    trainer.save_freq=4
    trainer.max_actor_ckpt_to_keep=2
    trainer.val_before_train=False
    trainer.test_freq=-1
)

# The soft overlong punishment of DAPO: the reward falls over the last OVERLONG tokens by up to 1; `acc` does not.
if ((OVERLONG > 0)); then
    OVERRIDES+=(
        reward.reward_manager.name=dapo
        +reward.reward_kwargs.max_resp_len="$RESPONSE"
        +reward.reward_kwargs.overlong_buffer_cfg.enable=True
        +reward.reward_kwargs.overlong_buffer_cfg.len="$OVERLONG"
        +reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0
        +reward.reward_kwargs.overlong_buffer_cfg.log=False
    )
fi

# A context longer than the model's own, for the trainer and for vLLM.
if [[ -n ${CONTEXT:-} ]]; then
    OVERRIDES+=(
        +actor_rollout_ref.model.override_config.max_position_embeddings="$CONTEXT"
        +$ROLLOUT.engine_kwargs.vllm.hf_overrides.max_position_embeddings="$CONTEXT"
    )
fi

exec python -m verl.trainer.main_ppo "${OVERRIDES[@]}" "$@"
