"""What cannot be honoured is refused before any worker starts, with the reason and what to set."""

import importlib
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import verl.trainer
from omegaconf import DictConfig, OmegaConf

import hapo.verl_cpu  # noqa: F401 - registers the platform before verl asks for it
from hapo.engines import verl as engine
from hapo.engines.identity import identity
from hapo.engines.verl import HAPORayTrainer
from hapo.engines.verl.config import MAIN, Settings, program_of, recipe, refuse_half_set, resolve_method
from hapo.engines.verl.config import check as check_config
from hapo.engines.verl.records import Records
from hapo.engines.verl.trainer import HAPOTrainerSync
from hapo.engines.version import require
from hapo.insight.finding import IN_VERL
from tests.verl.launch import ACTOR, METHOD, ROLLOUT, overrides_of

HAPO = "+hapo.method=hapo"
OFF = "+hapo.options.components=BCD"


@cache
def composed() -> DictConfig:
    """verl's own configuration with the overrides of our runs, by Hydra: half a second."""
    with hydra.initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        config = hydra.compose("ppo_trainer", overrides_of(Path("inputs"), Path("folder"), 1))
    OmegaConf.set_struct(config, False)
    return config


def compose(tmp_path: Path, *overrides: str) -> DictConfig:
    """The same with these overrides, and the run's folder here."""
    lines = [line.lstrip("+") for line in (f"trainer.default_local_dir={tmp_path}/run", *overrides)]
    merged = OmegaConf.merge(composed(), OmegaConf.from_dotlist(lines))
    assert isinstance(merged, DictConfig)
    return merged


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), r"needs a method: set \+hapo.method="),
        ((HAPO, "+hapo.methods=gspo"), "methods.*method"),
        (("+hapo.method=gsop",), "gspo"),
        ((HAPO, "+hapo.options.eps_hgih=0.3"), "eps_high"),
        ((HAPO, "+hapo.record_tokens_every=-1"), "record_tokens_every must be an integer >= 0, got -1"),
        ((HAPO, "+hapo.options.kl_coef=0.1"), "use_kl_loss=True"),
        ((HAPO, "+hapo.options.sampler_cap=3"), "rollout_is_threshold"),
        (("+hapo.method=vespo",), "corrects for the sampler by itself: set .*rollout_is=null"),
        ((HAPO, "algorithm.adv_estimator=grpo"), "algorithm.adv_estimator=hapo, got grpo"),
        ((HAPO, f"{ACTOR}.policy_loss.loss_mode=vanilla"), "loss_mode=hapo, got vanilla"),
        ((HAPO, "algorithm.rollout_correction.bypass_mode=True"), "bypass_mode=True.*set it to False"),
        ((HAPO, f"{ACTOR}.strategy=megatron"), "strategy=megatron was not tested: set fsdp2"),
        ((HAPO, "critic.enable=True"), "critic.enable=True cannot be honoured"),
        ((HAPO, f"{ACTOR}.clip_ratio_high=0.28"), r"clip_ratio_high=0.28.*set \+hapo.options.eps_high"),
        ((HAPO, "algorithm.gamma=0.9"), r"advantage=token_reward and \+hapo.options.gamma"),
        (
            (HAPO, "algorithm.rollout_correction.rollout_is=null"),
            "set algorithm.rollout_correction.rollout_is=token",
        ),
        ((HAPO, f"{ROLLOUT}.calculate_log_probs=False"), "set .*calculate_log_probs=True"),
        ((HAPO, f"{ROLLOUT}.logprobs_mode=raw_logprobs"), "set processed_logprobs"),
        (("+hapo.method=stapo", f"{ACTOR}.ulysses_sequence_parallel_size=2"), "entropy_source=old"),
        (
            (HAPO, "algorithm.filter_groups.metric=acc", "reward.reward_model.enable=True"),
            "a colocated reward model has none",
        ),
        ((HAPO, f"{ROLLOUT}.name=sglang"), "not tested in verl's sglang rollout: set .*name=vllm"),
        ((HAPO, "+hapo.options.entropy_source=current"), "set .*calculate_entropy=True"),
        (("+hapo.method=archer",), "kl_loss_coef=0"),
        (("+hapo.method=dft",), "dft.* learns from demonstrations.*run python -m hapo.verl_sft"),
        ((HAPO, "+hapo.demonstrations=x"), "hapo.demonstrations cannot be honoured.*Use hapo.trl.HAPOTrainer"),
        (("+hapo.method=espo",), "espo.* is one of masked-diffusion models, which verl does not train"),
    ],
)
def test_refused(tmp_path: Path, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        HAPOTrainerSync(compose(tmp_path, *overrides))


def test_missing_vllm(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="vLLM is not installed"):
        HAPOTrainerSync(compose(tmp_path, HAPO, f"{ROLLOUT}.name=vllm"))


def test_existing_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    for mode in ("disable", "auto"):
        with pytest.raises(FileExistsError, match="holds another run, and none of its checkpoints is resumed"):
            HAPOTrainerSync(compose(tmp_path, HAPO, f"trainer.resume_mode={mode}"))
    assert (tmp_path / "run" / "manifest.json").read_text() == "{}"


def test_another_method_does_not_resume(tmp_path: Path) -> None:
    """Nor the same one with other options; seen before any weight is loaded."""
    folder = tmp_path / "run" / "global_step_2"
    folder.mkdir(parents=True)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("2")
    with pytest.raises(ValueError, match="is missing: the checkpoint is of another trainer"):
        HAPOTrainerSync(compose(tmp_path, HAPO))
    method, _ = resolved(tmp_path, HAPO)
    state = {"method": identity(method), "steps": 6, "stats": None}
    (folder / "hapo.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"eps_high: 0.28 there, 0.3 here"):
        HAPOTrainerSync(compose(tmp_path, HAPO, "+hapo.options.eps_high=0.3"))
    with pytest.raises(ValueError, match=r"method: 'hapo' there, 'gspo' here"):
        HAPOTrainerSync(compose(tmp_path, "+hapo.method=gspo"))


def resolved(tmp_path: Path, *overrides: str) -> tuple[Any, dict[str, Any]]:
    config: Any = OmegaConf.to_container(compose(tmp_path, *overrides), resolve=True)
    method = resolve_method(config, Settings.of(config))
    check_config(config, method)
    return method, recipe(config, method)


def test_what_verl_decides(tmp_path: Path) -> None:
    """The cap of the sampler's weight and the weight of the KL penalty come from verl's options."""
    method, told = resolved(tmp_path, HAPO, "algorithm.rollout_correction.rollout_is_threshold=3.0")
    assert method.sampler_cap == 3.0 and told["beta"] == 0.0 and told["method"] == "hapo"
    none, _ = resolved(tmp_path, HAPO, OFF, "algorithm.rollout_correction.rollout_is=null")
    assert none.sampler_cap is None
    kl = (f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0.02")
    method, told = resolved(tmp_path, "+hapo.method=grpo", *kl)
    assert method.penalty is None and told["beta"] == 0.02
    kl = (f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0")
    method, told = resolved(tmp_path, "+hapo.method=archer", *kl, f"{ACTOR}.calculate_entropy=True")
    assert method.penalty is not None and told["beta"] == 0.001


def test_penalty_of_the_paper_is_missed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="kl_loss_coef=0.04"):
        resolved(tmp_path, "+hapo.method=grpo")


def test_one_update_a_rollout_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing is ever clipped"):
        resolved(tmp_path, HAPO, f"{ACTOR}.ppo_mini_batch_size=4", f"{ACTOR}.ppo_epochs=1")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((*METHOD[1:], HAPO), "set trainer.v1.trainer_mode=hapo"),
        ((*METHOD[1:], HAPO, "trainer.v1.trainer_mode=colocate_async"), "got colocate_async"),
        ((HAPO, "algorithm.adv_estimator=grpo"), "set trainer.v1.trainer_mode=hapo"),
        ((*METHOD, HAPO, "trainer.use_v1=False"), "run python -m hapo.verl_main instead"),
    ],
)
def test_other_trainers(overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        refuse_half_set(overrides)


def test_each_main_has_its_trainer() -> None:
    refuse_half_set((*METHOD, HAPO, "trainer.use_v1=False"), MAIN)
    with pytest.raises(ValueError, match="set trainer.use_v1=False, or run verl.trainer.main_ppo"):
        refuse_half_set((*METHOD, HAPO), MAIN)
    assert program_of(["python", "-m", "hapo.verl_main", HAPO]) == MAIN
    assert program_of(["python", "-m", "verl.trainer.main_ppo", HAPO]) != MAIN


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("+hapo.options.eps_hgih=0.3",), "eps_high"),
        (("trainer.use_v1=True",), "trainer.use_v1=True is run by python -m verl.trainer.main_ppo"),
        (("algorithm.filter_groups.enable=True",), "filter_groups.enable=True is not honoured .*: leave it out"),
        (("trainer.balance_batch=False",), "balance_batch=False .*: set it to True"),
        (
            (f"{ROLLOUT}.agent.agent_loop_manager_class=mine.Manager",),
            "mine.Manager takes the place .*leave it out",
        ),
    ],
)
def test_refused_without_the_queue(tmp_path: Path, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        HAPORayTrainer(compose(tmp_path, HAPO, "trainer.use_v1=False", *overrides))


def test_main_refuses_other_trainers(tmp_path: Path) -> None:
    """verl's main itself, at once: before Ray, before the configuration is composed."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *METHOD[1:], HAPO]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode and "set trainer.v1.trainer_mode=hapo" in done.stderr
    assert "ray init kwargs" not in done.stdout


def test_remedies_name_options_of_verl(tmp_path: Path) -> None:
    """The doctor's, for runs of verl."""
    config = compose(tmp_path)
    for text in IN_VERL.values():
        for path in re.findall(r"[+\w.]+", text):
            if "." not in path or path.startswith("+"):  # "+": verl does not know it yet
                continue
            parent, _, key = path.rpartition(".")
            assert key in OmegaConf.select(config, parent), path


def test_other_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another minor release is refused when the module is imported, as verl's main does (the test above)."""
    monkeypatch.setattr("hapo.engines.version.version", lambda name: "0.10.0")
    with pytest.raises(ImportError, match=r"tested with verl 0.9 and refuses 0.10.0"):
        importlib.reload(engine)
    monkeypatch.setattr("hapo.engines.version.version", lambda name: "0.9.7")
    require("verl")


def test_other_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hapo.engines.verl.config.find_spec", lambda name: object())
    monkeypatch.setattr("hapo.engines.verl.config.version", lambda name: "0.34.1")
    with pytest.raises(ImportError, match="tested with vLLM 0.24 to 0.33, this is 0.34.1"):
        resolved(tmp_path, HAPO, f"{ROLLOUT}.name=vllm")
    resolved(tmp_path, HAPO, OFF, f"{ROLLOUT}.name=vllm")  # without a temperature any will do


def test_validation_with_verdicts_missing(tmp_path: Path) -> None:
    """verl fills in None for a data source whose reward function returns no `acc`."""
    config: Any = OmegaConf.to_container(
        compose(tmp_path, HAPO, f"{ROLLOUT}.val_kwargs.temperature=0.5"), resolve=True
    )
    _, told = resolved(tmp_path, HAPO, f"{ROLLOUT}.val_kwargs.temperature=0.5")
    records = Records.open(config, Settings.of(config), told, None)
    assert records is not None and "ray_kwargs" not in told["verl"]
    infos = {"reward": [1.0, 0.5, 0.0, 0.5], "acc": [1.0, None, 0.0, None]}
    records.add_evaluation(3, ["a", "b", "a", "b"], infos)
    line = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
    assert line["mean"] == 0.5 and line["how"] == "sampled" and not line["binary"]
    assert (line["problems"], line["samples"], line["scores"]) == (2, 2, [0.5, 0.5])
