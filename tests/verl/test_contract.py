"""What this engine takes of verl's two trainers: if one of these moves, hapo must be looked at again.

test_replay.py proves by whole runs that the engine does on them what it says; here it is seen in a second what moved.
"""

import ast
import inspect
from pathlib import Path

import pytest
import verl
from verl.experimental.agent_loop import AgentLoopManager
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer import main_ppo_v0
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.trainer.sft_trainer import SFTTrainer
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.rollout.replica import TokenOutput

import hapo.engines.verl
import hapo.verl_cpu
from hapo.engines.verl.ray_trainer import HAPORayTrainer
from hapo.engines.verl.sft import SupervisedSFTTrainer
from hapo.engines.verl.trainer import HAPOTrainerSync

WITH_QUEUE = {
    "__init__": ["config"],
    "_init_resource_pool_mgr": [],
    "get_llm_client": [],
    "on_init_end": [],
    "on_validate_begin": [],
    "prepare_step": [],
    "_compute_advantage": ["batch", "metrics"],
    "_update_actor": ["batch", "metrics"],
    "step": ["metrics", "timing_raw"],
    "_save_checkpoint": [],
    "_load_checkpoint": [],
    "_val_metrics_update": [
        *("data_sources", "sample_uids", "reward_extra_infos_dict", "sample_turns", "expected_acc_counts"),
    ],
    "_compute_metrics": ["batch", "metrics", "timing_raw", "global_steps", "epoch"],
    "on_train_end": [],
}
WITHOUT_QUEUE = {
    "init_workers": [],
    "_validate": ["merged"],
    "_get_gen_batch": ["batch"],
    "_balance_batch": ["batch", "metrics", "logging_prefix", "keep_minibatch"],
    "_compute_old_log_prob": ["batch"],
    "_compute_ref_log_prob": ["batch"],
    "_update_actor": ["batch"],
    "fit": [],
    "_save_checkpoint": [],
    "_load_checkpoint": [],
    "_val_metrics_update": ["data_sources", "sample_uids", "reward_extra_infos_dict", "sample_turns"],
}
BESIDE = [
    (main_ppo_v0.BaseTaskRunner.add_actor_rollout_worker, ["config"]),
    (main_ppo_v0.BaseTaskRunner.add_reward_model_resource_pool, ["config"]),
    (main_ppo_v0.BaseTaskRunner.init_resource_pool_mgr, ["config"]),
    (AgentLoopManager.__init__, ["config", "llm_client", "teacher_client", "reward_loop_worker_handles"]),
    (NaiveRewardManager.run_single, ["data"]),
    (TrainingWorker.set_loss_fn, ["loss_fn"]),
    (TrainingWorker.train_batch, ["data"]),
    (ActorRolloutRefWorker.init_model, []),
    (SFTTrainer._build_engine, []),
]


def names(function: object) -> list[str]:
    """Parameters; Ray, which runs the class in a process of its own, adds one."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "_ray_trace_ctx")]


@pytest.mark.parametrize(
    ("theirs", "ours", "hooks"),
    [
        (PPOTrainerSync, HAPOTrainerSync, WITH_QUEUE),
        (RayPPOTrainer, HAPORayTrainer, WITHOUT_QUEUE),
        (SFTTrainer, SupervisedSFTTrainer, {"_build_engine": []}),
    ],
)
def test_what_is_overridden_is_there(theirs: type, ours: type, hooks: dict[str, list[str]]) -> None:
    """By these names and parameters; nothing else of verl's trainer is overridden."""
    assert {name: names(getattr(theirs, name)) for name in hooks} == hooks
    own = {name for name, x in vars(ours).items() if inspect.isfunction(x) and hasattr(theirs, name)}
    assert own - {"__init__"} == set(hooks) - {"__init__"}


def test_what_is_called_is_there() -> None:
    for function, expected in BESIDE:
        assert names(function) == expected, function


def test_the_loop_without_queue_calls_in_this_order() -> None:
    """A step's prompts, its whole rollout with its metrics, the rewards, old and reference policy, advantage, update."""
    order = (
        "self._get_gen_batch(batch)",
        "self.async_rollout_manager.generate_sequences(",
        "self._balance_batch(batch, metrics=metrics)",
        "extract_reward(batch)",
        "self._compute_old_log_prob(batch)",
        "self._compute_ref_log_prob(batch)",
        "compute_rollout_correction_and_add_to_batch(batch,",
        "batch = compute_advantage(",
        "self._update_actor(batch)",
        "self._save_checkpoint()",
        "reduce_metrics(actor_output.meta_info",
        "logger.log(data=metrics, step=self.global_steps)",
    )
    loop = inspect.getsource(RayPPOTrainer.fit)
    loop = loop[loop.index("for batch_dict in self.train_dataloader") :]
    places = [loop.find(call) for call in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places, strict=True))


def test_one_file_knows_the_queue() -> None:
    """And the trainer without it is reached without it."""
    folder = Path(hapo.engines.verl.__file__).parent
    importers: dict[str, set[str]] = {}
    for file in folder.glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        importers[file.name] = {
            module
            for node in nodes
            for module in (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names]
            )
        }
    assert [name for name, found in importers.items() if "transfer_queue" in found] == ["queue.py"]
    assert [name for name, found in importers.items() if "queue" in found] == ["trainer.py"]
    assert [name for name, found in importers.items() if "trainer" in found] == ["__init__.py"]


def test_no_rollout_hands_on_the_support_of_a_draw() -> None:
    """As docs/sampling.md and the table of hapo.versions say; once one does, log-probs can be taken over it."""
    told = {"token_ids", "log_probs", "routed_experts", "stop_reason", "num_preempted", "extra_fields"}
    assert set(TokenOutput.model_fields) == told
    files = [*Path(verl.__file__).parent.rglob("*.py")]
    assert len(files) > 100
    assert [file for file in files if "sampling_mask" in file.read_text()] == []
