"""Starts verl as a user would, by its own `main_ppo` or by hapo's, and kills it whole."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LIMIT = 900
"""Seconds that a run may take, half a minute on a free machine: verl hangs when one of its workers dies."""

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

WITH_QUEUE, WITHOUT_QUEUE = "verl.trainer.main_ppo", "hapo.verl_main"
"""What starts verl's two trainers."""

RATE, EPS = 4e-3, 1e-2
"""Of AdamW: the rate so high that tokens are clipped, epsilon so large that it does not blow up the rounding of small
gradients within twelve steps."""

METHOD = (
    "trainer.v1.trainer_mode=hapo",
    "algorithm.adv_estimator=hapo",
    f"{ACTOR}.policy_loss.loss_mode=hapo",
)

HAPO = (
    "+hapo.method=hapo",
    # One mini-batch: verl puts responses in the order in which they were ready, which no seed decides.
    f"{ACTOR}.ppo_mini_batch_size=4",
    "trainer.total_training_steps=3",
    "trainer.test_freq=3",
    "trainer.val_before_train=True",
    "algorithm.filter_groups.metric=acc",
)
"""Three global steps of hapo, each of three optimiser steps, with validation before and after."""

SCORES = (
    "+hapo.options.advantage=token_reward",
    "reward.reward_manager.name=hapo_tokens",
    "reward.custom_reward_function.name=by_token",
)
"""A score for each token, from the reward function to the advantage."""

STAPO = ("+hapo.method=stapo", *SCORES)
"""Two global steps of two mini-batches and three epochs; the tokens kept depend on the policy of each step."""

BY_TOKEN = (
    "+hapo.method=hapo",
    *SCORES,
    "trainer.use_v1=False",
    "~trainer.v1.trainer_mode",
    "trainer.test_freq=2",
    "trainer.val_before_train=True",
    "algorithm.filter_groups.metric=acc",
)
"""The trainer without a queue, two global steps, with a score for each token."""


def overrides_of(inputs: Path, folder: Path, ranks: int) -> list[str]:
    """4 prompts x 4 samples x 16 tokens, 2 mini-batches x 3 epochs, at a learning rate at which tokens are clipped."""
    return [
        *METHOD,
        "algorithm.rollout_correction.rollout_is=token",
        f"data.train_files={inputs}/train.parquet",
        f"data.val_files={inputs}/val.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=16",
        "data.max_response_length=16",
        "data.dataloader_num_workers=0",
        "data.seed=1",
        f"reward.custom_reward_function.path={inputs}/reward.py",
        "reward.num_workers=1",
        f"actor_rollout_ref.model.path={inputs}/model",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"{ACTOR}.strategy=fsdp2",
        f"{ACTOR}.ppo_mini_batch_size=2",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=2",
        f"{ACTOR}.ppo_epochs=3",
        f"{ACTOR}.optim.lr={RATE}",
        f"{ACTOR}.optim.override_optimizer_config={{eps:{EPS}}}",
        f"{ACTOR}.use_dynamic_bsz=False",
        f"{ACTOR}.use_torch_compile=False",
        f"{ACTOR}.fsdp_config.model_dtype=fp32",
        f"+{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp32",
        f"+{ACTOR}.fsdp_config.mixed_precision.reduce_dtype=fp32",
        f"+{ACTOR}.fsdp_config.mixed_precision.buffer_dtype=fp32",
        f"{ROLLOUT}.name=transformers",
        f"{ROLLOUT}.n=4",
        f"{ROLLOUT}.calculate_log_probs=True",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4",
        f"{ROLLOUT}.free_cache_engine=False",
        f"{ROLLOUT}.tensor_model_parallel_size={ranks}",  # one server, whatever the number of ranks
        f"{ROLLOUT}.agent.num_workers=1",
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={ranks}",
        "trainer.nnodes=1",
        "trainer.total_training_steps=2",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=1",
        f"trainer.default_local_dir={folder}/run",
        f"+ray_kwargs.ray_init.num_gpus={ranks}",
        "ray_kwargs.ray_init.num_cpus=16",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "+hapo.record_tokens_every=1",
    ]


@dataclass
class VerlRun:
    """A run of verl, and what it left."""

    inputs: Path
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def out(self) -> Path:
        """The run's folder: records and checkpoints."""
        return self.folder / "run"

    @property
    def log(self) -> str:
        """What it printed."""
        return (self.folder / "log").read_text(errors="replace")

    def end(self) -> int:
        """Wait, but not for ever; nothing of the run is left."""
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            self.kill()

    def wait(self) -> "VerlRun":
        """Wait for a run that succeeds."""
        code = self.end()
        assert code == 0, f"exit {code} of main_ppo\n{self.log[-6000:]}"
        return self

    def kill(self) -> None:
        """As `kill -9` on the driver and all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


def launch(inputs: Path, folder: Path, *overrides: str, ranks: int = 1, module: str = WITH_QUEUE) -> VerlRun:
    """Start a run; later overrides replace earlier ones, and `~key` takes one out."""
    given: dict[str, str] = {}
    for line in (*overrides_of(inputs, folder, ranks), *overrides):
        key, _, value = line.partition("=")
        given.pop(key.lstrip("+~"), None)
        if not key.startswith("~"):
            given[key.lstrip("+")] = f"{key}={value}"
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *given.values()],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    return VerlRun(inputs, folder, process)
