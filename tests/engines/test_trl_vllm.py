"""What the TRL engine hands to vLLM; the engine itself runs in tests_vllm."""

from types import SimpleNamespace

import pytest

import hapo
from hapo.engines.trl import vllm
from hapo.samplers.rule import TemperatureRule

STATS = hapo.EntropyStats(pivot=-0.1, sigma=1.5, h_max=0.8, h_min=-4.5)


def sender(method: hapo.Method, mode: str, kwargs: dict) -> SimpleNamespace:
    return SimpleNamespace(method=method, vllm_generation=SimpleNamespace(mode=mode, generation_kwargs=kwargs))


@pytest.mark.parametrize(("mode", "key"), [("colocate", "extra_args"), ("server", "vllm_xargs")])
def test_the_rule_of_the_last_statistics_goes_out_with_the_requests(mode, key):
    method = hapo.method("hapo", temperature={"tau": 0.2, "law": "zscore"})
    trainer = sender(method, mode, {"seed": 3, key: {"mine": 1}})
    kwargs = trainer.vllm_generation.generation_kwargs
    vllm.send_rule(trainer, STATS)
    rule = TemperatureRule.from_args(kwargs[key])
    assert (rule.law.tau, rule.law.law, rule.stats) == (0.2, "zscore", STATS)
    assert (kwargs["seed"], kwargs[key]["mine"]) == (3, 1)
    vllm.send_rule(trainer, None)  # no statistics, or an evaluation
    assert kwargs[key] == {"mine": 1}


def test_nothing_goes_out_without_an_adaptive_temperature():
    trainer = sender(hapo.method("dapo"), "colocate", {})
    vllm.send_rule(trainer, STATS)
    assert trainer.vllm_generation.generation_kwargs == {"extra_args": None}


@pytest.mark.parametrize(("status", "text"), [(200, "{}"), (400, "no such model")])
def test_a_server_without_the_processor_is_refused(status, text):
    """It is asked for something that only the processor refuses."""
    asked = []

    def post(url, json):
        asked.append((url, json["vllm_xargs"]))
        return SimpleNamespace(status_code=status, text=text)

    client = SimpleNamespace(
        get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}},
        session=SimpleNamespace(post=post),
        base_url="http://server",
        model="m",
    )
    trainer = sender(hapo.method("hapo"), "server", {})
    trainer.vllm_generation.vllm_client = client
    trainer.accelerator = SimpleNamespace(is_main_process=True)
    with pytest.raises(RuntimeError, match="install hapo beside its vLLM"):
        vllm.attach(trainer)
    with pytest.raises(ValueError, match="tau must be"):
        TemperatureRule.from_args(asked[0][1])
    status, text = 400, "tau must be in [0, 1)"
    vllm.attach(trainer)


def test_a_server_with_log_probs_of_another_distribution_is_refused():
    client = SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": "raw_logprobs"}})
    trainer = sender(hapo.method("hapo"), "server", {})
    trainer.vllm_generation.vllm_client = client
    trainer.accelerator = SimpleNamespace(is_main_process=True)
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        vllm.attach(trainer)
