"""The commands of recipes/verl against verl's own configuration and checks, and against the recipes of the TRL engine."""

import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
import pyarrow.parquet as pq
import pytest
import verl.trainer
import yaml
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import omega_conf_to_dataclass, validate_config

import hapo
from hapo.engines.metrics import NAMES as METRICS
from hapo.engines.verl.config import DECIDED_BY_METHOD, Settings, check, recipe, resolve_method, select
from hapo.engines.verl.records import NAMES as RECORDED

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
CONFIG = Path(verl.trainer.__file__).parent / "config"
PAPER = sorted(file.stem for file in (RECIPES / "verl").glob("hapo_*.sh"))

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def overrides_of(script: str, tmp_path: Path, **environment: str) -> list[str]:
    """What a script hands to verl: a `python` of ours is first on its path, and starts nothing but one-liners."""
    told, fake = tmp_path / "told", tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\n"
        f'case "$1 $2" in "-m verl.trainer.main_ppo") shift 2; printf "%s\\n" "$@" >{told};; '
        f'"-c "*) exec {sys.executable} "$@";; esac\n'
    )
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(RECIPES / "verl" / f"{script}.sh"), "trainer.project_name=mine"]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path, **environment}, timeout=300)
    return told.read_text().splitlines()


def compose(overrides: list[str]) -> tuple[DictConfig, dict[str, Any]]:
    """verl's configuration, its own checks done."""
    with hydra.initialize_config_dir(str(CONFIG), version_base=None):
        config = hydra.compose("ppo_trainer", overrides)
    validate_config(config=config, use_reference_policy=False, use_critic=False)
    for section in (ROLLOUT, "algorithm", f"{ACTOR}.fsdp_config", f"{ACTOR}.optim"):
        omega_conf_to_dataclass(OmegaConf.select(config, section))  # knows every key
    plain: Any = OmegaConf.to_container(config, resolve=True)
    get_trainer_cls(plain["trainer"]["v1"]["trainer_mode"])
    return config, plain


def test_every_recipe_of_the_paper_has_a_script() -> None:
    assert sorted(file.stem for file in RECIPES.glob("hapo_*.yaml")) == PAPER and len(PAPER) == 6


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_as_in_the_recipes_of_trl(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hapo.engines.verl.config._check_vllm", lambda tempered: None)
    trl = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    overrides = overrides_of(name, tmp_path)
    config, plain = compose(overrides)
    method = resolve_method(plain, Settings.of(plain))
    check(plain, method)
    assert method.options == hapo.method(trl["method"], **trl["method_options"]).options
    told = recipe(plain, method)
    assert told["top_p"] == 1 and "top_k" not in told
    for key in (
        "model_name_or_path",
        "learning_rate",
        "num_generations",
        "max_completion_length",
        "temperature",
        "beta",
    ):
        assert told[key] == trl[key], key

    def get(path: str) -> Any:
        return select(plain, path)

    assert get("data.train_batch_size") // get(f"{ACTOR}.ppo_mini_batch_size") * get(f"{ACTOR}.ppo_epochs") == 16
    assert trl["steps_per_generation"] // trl["gradient_accumulation_steps"] == 16
    assert get(f"{ACTOR}.ppo_mini_batch_size") * get(f"{ROLLOUT}.n") == 512
    assert get("trainer.nnodes") * get("trainer.n_gpus_per_node") == 32
    assert get("algorithm.filter_groups.enable") and get("algorithm.filter_groups.metric") == "acc"
    assert get(f"{ACTOR}.optim.weight_decay") == trl["weight_decay"]
    assert get(f"{ACTOR}.grad_clip") == trl["max_grad_norm"]
    buffer = get("reward.reward_kwargs.overlong_buffer_cfg") or {"len": 0}
    assert buffer["len"] == trl["overlong_buffer"]
    assert get("reward.reward_manager.name") == ("dapo" if trl["overlong_buffer"] else "naive")
    assert get("reward.reward_kwargs.max_resp_len") in (None, trl["max_completion_length"])
    context = trl.get("model_init_kwargs", {}).get("max_position_embeddings")
    for where in ("actor_rollout_ref.model.override_config", f"{ROLLOUT}.engine_kwargs.vllm.hf_overrides"):
        assert get(f"{where}.max_position_embeddings") == context
    assert get("trainer.project_name") == "mine"  # arguments come last
    assert config.ray_kwargs.ray_init.runtime_env.env_vars == {"VERL_USE_EXTERNAL_MODULES": "hapo.verl"}


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_on_one_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hapo.engines.verl.config._check_vllm", lambda tempered: None)
    _, plain = compose(overrides_of(name, tmp_path, NNODES="1", GPUS="1"))
    check(plain, resolve_method(plain, Settings.of(plain)))
    assert select(plain, "data.train_batch_size") == 16 * select(plain, f"{ACTOR}.ppo_mini_batch_size") == 64
    assert select(plain, f"{ROLLOUT}.tensor_model_parallel_size") == 1
    assert select(plain, f"{ACTOR}.fsdp_config.offload_policy") is True


def test_the_smoke_run(tmp_path: Path) -> None:
    """Its command only: it takes minutes, and tests/verl/test_runs.py has runs of its kind."""
    _, plain = compose(overrides_of("smoke_cpu", tmp_path))
    check(plain, resolve_method(plain, Settings.of(plain)))
    assert (
        select(plain, "actor_rollout_ref.model.custom_chat_template")
        == "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert Path(select(plain, "actor_rollout_ref.model.path")).is_dir()


def test_problems_and_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data as verl reads them, and a reward that no answer can hold up."""
    files = tmp_path / "sums.jsonl"
    files.write_text('{"question": "1+1", "answer": "#### 2"}\n{"question": "1/3+1/6", "answer": "0.5"}\n' * 2)

    def prepare(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "data"), *options])
        runpy.run_path(str(RECIPES / "verl" / "prepare.py"), run_name="__main__")

    prepare(f"dataset={files}", "chat=true", "system_prompt=Think.", "eval_size=1")
    (row,) = pq.read_table(tmp_path / "data" / "val.parquet").to_pylist()
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["extra_info"]["index"] == 0 and row["data_source"] == str(files)
    with pytest.raises(SystemExit, match="'dataste' is no option of a task"):
        prepare("dataste=x")

    reward: dict[str, Any] = {}
    exec((RECIPES / "verl" / "reward.py").read_text(), reward)
    score = reward["compute_score"]
    assert score("addition", "7+6=13;933", "933") == {"score": 1.0, "acc": 1.0}
    assert score("addition", "7+6=13;0933", "933") == {"score": 0.0, "acc": 0.0}
    assert score("gsm8k", r"so \boxed{\frac{1}{2}}", "#### 0.5", {"index": 0})["acc"] == 1.0
    assert score("gsm8k", r"\boxed{10**10**10}", "3")["score"] == 0.0


def test_the_page_of_the_engine_is_complete() -> None:
    """Every setting with its default, every option that the method decides, every name in records and trackers."""
    page = (ROOT / "docs/verl_reference.md").read_text()
    for setting in fields(Settings):
        told = re.search(rf"^\| `{setting.name}` \| (.*?) \|", page, re.MULTILINE)
        assert told and (not isinstance(setting.default, int) or told[1] == str(setting.default)), setting.name
    for path, (_, remedy) in DECIDED_BY_METHOD.items():
        assert f"| `{path}` | {remedy} |" in page
    for theirs, ours in RECORDED.items():
        assert f"| `{theirs}` | `{ours}`" in page
    for name in METRICS.values():
        assert f"`hapo/{name}`" in page
