#!/usr/bin/env bash
# HAPO on stock verl, on one machine without a GPU: the bundled tiny model learns three-digit addition.
#
# Needs: pip install -e ".[verl]"; two cores, 8 GB of memory. No download.
# Time: about four minutes; docs/verl.md has the figures.
# Command: bash recipes/verl/smoke_cpu.sh [further overrides of verl]
# Afterwards: hapo report runs/verl_smoke; hapo doctor runs/verl_smoke   (both need hapo[insight])
#
# Ray, TransferQueue, FSDP2 over gloo, checkpoints and trackers are verl's own. Two things are not what a GPU run uses:
# the platform "cpu" and the rollout "transformers", both of hapo.verl_cpu.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-runs/verl_smoke}
DATA=${DATA:-runs/verl_smoke_data}
MODEL=$(python -c "from hapo.assets import tiny_model_path; print(tiny_model_path())")

export VERL_USE_EXTERNAL_MODULES=hapo.verl_cpu  # hapo.verl, and verl's platform and rollout for CPUs
export OMP_NUM_THREADS=1 TQ_NUM_THREADS=1

python recipes/verl/prepare.py "$DATA" eval_size=200

ACTOR=actor_rollout_ref.actor
ROLLOUT=actor_rollout_ref.rollout

OVERRIDES=(
    # The method: what every run with hapo needs.
    trainer.v1.trainer_mode=hapo
    algorithm.adv_estimator=hapo
    $ACTOR.policy_loss.loss_mode=hapo
    +hapo.method=hapo
    +hapo.record_tokens_every=4
    algorithm.rollout_correction.rollout_is=token
    $ROLLOUT.calculate_log_probs=True

    # A rollout batch: 16 problems x 8 answers, used for 4 optimiser steps.
    data.train_batch_size=16
    $ROLLOUT.n=8
    $ACTOR.ppo_mini_batch_size=4
    $ACTOR.ppo_micro_batch_size_per_gpu=32
    $ROLLOUT.log_prob_micro_batch_size_per_gpu=128
    $ACTOR.optim.lr=5e-5
    trainer.total_training_steps=12

    # The task.
    data.train_files="$DATA/train.parquet"
    data.val_files="$DATA/val.parquet"
    data.max_prompt_length=16
    data.max_response_length=32
    data.dataloader_num_workers=0
    reward.custom_reward_function.path=recipes/verl/reward.py
    reward.num_workers=1

    # The model reads a+b= and nothing else: no chat template.
    actor_rollout_ref.model.path="$MODEL"
    actor_rollout_ref.model.custom_chat_template="'{% for m in messages %}{{ m.content }}{% endfor %}'"

    # A CPU: float32, no fused kernels, a GPU that is only said to be there.
    trainer.device=cpu
    trainer.nnodes=1
    trainer.n_gpus_per_node=1
    +ray_kwargs.ray_init.num_gpus=1
    ray_kwargs.ray_init.num_cpus=16
    +ray_kwargs.ray_init.include_dashboard=False
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    $ROLLOUT.name=transformers
    $ROLLOUT.tensor_model_parallel_size=1
    $ROLLOUT.free_cache_engine=False
    $ROLLOUT.agent.num_workers=1
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    actor_rollout_ref.model.use_remove_padding=False
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    $ACTOR.strategy=fsdp2
    $ACTOR.use_torch_compile=False
    $ACTOR.fsdp_config.model_dtype=fp32
    +$ACTOR.fsdp_config.mixed_precision.param_dtype=fp32
    +$ACTOR.fsdp_config.mixed_precision.reduce_dtype=fp32
    +$ACTOR.fsdp_config.mixed_precision.buffer_dtype=fp32

    # What is written, and when. A second run into the same folder resumes; set OUT for another.
    trainer.logger='[console]'
    trainer.default_local_dir="$OUT"
    hydra.run.dir="$OUT/hydra"
    trainer.save_freq=6
    trainer.max_actor_ckpt_to_keep=1
    trainer.val_before_train=True
    trainer.test_freq=12
)

exec python -m verl.trainer.main_ppo "${OVERRIDES[@]}" "$@"
