"""What the TRL engine hands to vLLM; the engine itself runs in tests/vllm."""

from types import SimpleNamespace

import pytest
import torch

import hapo
from hapo.engines.trl import vllm
from hapo.samplers.rule import TemperatureRule

STATS = hapo.EntropyStats(pivot=-0.1, sigma=1.5, h_max=0.8, h_min=-4.5)


def engine(mode: str, kwargs: dict, **more) -> SimpleNamespace:
    """TRL's `vllm_generation`."""
    return SimpleNamespace(mode=mode, generation_kwargs=kwargs, **more)


@pytest.mark.parametrize(("mode", "key"), [("colocate", "extra_args"), ("server", "vllm_xargs")])
def test_the_rule_of_the_last_statistics_goes_out_with_the_requests(mode, key):
    method = hapo.method("hapo", temperature={"tau": 0.2, "rule": "zscore"})
    generation = engine(mode, {"seed": 3, key: {"mine": 1}})
    given = generation.generation_kwargs
    vllm.send_rule(generation, method, STATS)
    sent = generation.generation_kwargs
    rule = TemperatureRule.from_args(sent[key])
    assert (rule.options.tau, rule.options.rule, rule.stats) == (0.2, "zscore", STATS)
    assert (sent["seed"], sent[key]["mine"]) == (3, 1)
    vllm.send_rule(generation, method, None)  # no statistics, or an evaluation
    assert generation.generation_kwargs == given == {"seed": 3, key: {"mine": 1}}


def test_nothing_goes_out_without_an_adaptive_temperature():
    generation = engine("colocate", {})
    vllm.send_rule(generation, hapo.method("dapo"), STATS)
    assert generation.generation_kwargs == {}


SILENT, REFUSED, TAKEN = (200, "{}"), (400, "tau must be in [0, 1)"), (200, "{}")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([SILENT], "install hapo beside its vLLM"),
        ([(400, "no such model")], "install hapo beside its vLLM"),
        ([REFUSED, (400, "this is 0.31")], "refuses adaptive temperatures: this is 0.31"),
        ([REFUSED, TAKEN], None),
    ],
)
def test_a_server_is_asked_for_a_wrong_and_for_a_right_rule(answers, message):
    asked = []

    def post(url, json):
        asked.append(json["vllm_xargs"])
        status, text = answers[len(asked) - 1]
        return SimpleNamespace(status_code=status, text=text)

    client = SimpleNamespace(
        get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}},
        session=SimpleNamespace(post=post),
        base_url="http://server",
        model="m",
    )
    generation = engine("server", {}, vllm_client=client)
    if message is not None:
        with pytest.raises(RuntimeError, match=message):
            vllm.attach(generation, hapo.method("hapo"), is_main=True)
        return
    vllm.attach(generation, hapo.method("hapo"), is_main=True)
    with pytest.raises(ValueError, match="tau must be"):
        TemperatureRule.from_args(asked[0])
    assert TemperatureRule.from_args(asked[1]).factor(torch.rand(3)).tolist() == [1, 1, 1]


def test_a_server_with_log_probs_of_another_distribution_is_refused():
    client = SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": "raw_logprobs"}})
    generation = engine("server", {}, vllm_client=client)
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        vllm.attach(generation, hapo.method("hapo"), is_main=True)


def test_weights_go_out_as_they_are_while_an_adapter_is_merged():
    """TRL merges it, hands the weights over, and takes it out again, all in the same memory."""
    weight, sent = torch.zeros(2), []

    def merged():
        weight.add_(1)
        yield "w", weight
        weight.sub_(1)

    llm = SimpleNamespace(
        collective_rpc=lambda method, kwargs: sent.extend(kwargs["weights_iterator"]),
        reset_prefix_cache=lambda: None,
    )
    vllm._reload_weights(SimpleNamespace(_iter_named_params=merged, llm=llm))
    assert [(name, x.tolist()) for name, x in sent] == [("w", [1.0, 1.0])]
    assert weight.tolist() == [0, 0]
