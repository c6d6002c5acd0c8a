"""What the TRL engine hands to vLLM; the engine itself runs in tests/vllm."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hapo
from hapo.engines.trl import vllm
from hapo.engines.trl.drawn import DrawnScores
from hapo.engines.trl.options import check_unscored
from hapo.samplers.decoding import Draws
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
        assert json["top_k"] > 0  # or a server that tells supports of draws answers 500
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


PLAIN = {
    "use_vllm": True, "vllm_mode": "colocate", "repetition_penalty": 1.0,
    "generation_kwargs": None, "vllm_structured_outputs_regex": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "others", "named"),
    [
        ({"use_vllm": False}, {}, "use_vllm=False"),
        ({"vllm_mode": "server"}, {}, "vllm_mode='server'"),
        ({"repetition_penalty": 1.1}, {}, "repetition_penalty=1.1"),
        ({"generation_kwargs": {"presence_penalty": 1.0}}, {}, "generation_kwargs="),
        ({}, {"tools": [len]}, "drop tools"),
    ],
)
def test_rollouts_go_unscored_only_where_vllm_knows_the_policy(given, others, named):
    check_unscored(SimpleNamespace(**PLAIN), {"tools": None})
    with pytest.raises(ValueError, match=named):
        check_unscored(SimpleNamespace(**PLAIN | given), others)


class Net(nn.Module):
    """What is asked of a model."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        self.dropout = nn.Dropout(dropout)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(attention_dropout=0.0))


def test_trusted_draws_are_compared_now_and_then_and_taken_else():
    """Rollouts 1, 2 and 4 of five are scored, in half precision too; a gap that rounding cannot explain ends it."""
    ids, mask = torch.tensor([[3, 4]]), torch.tensor([[True, True]])
    drawn = Draws(ids, *(torch.full((1, 2), x) for x in (-1.0, -1.5, 0.7)))
    scored = []

    def score(gap=0.01):
        scored.append(gap)
        return torch.full((1, 2), -1.5 + gap), torch.full((1, 2), 0.7)

    scores = DrawnScores(Accelerator(cpu=True), trusted=True)
    for _ in range(5):
        logp, entropy = scores.scores(Net(), [drawn], ids, mask, score)
        assert logp.tolist() == [[-1.5, -1.5]]
        assert torch.equal(entropy, torch.full((1, 2), 0.7))
    assert len(scored) == 3
    assert scores.scores(Net(), [None], ids, mask, score)[0].tolist()[0] == pytest.approx([-1.49, -1.49])
    with pytest.raises(RuntimeError, match="0.2 nats per token.*score_rollouts=True"):
        DrawnScores(Accelerator(cpu=True), trusted=True).scores(Net(), [drawn], ids, mask, lambda: score(0.2))
    with pytest.raises(ValueError, match="Net has dropout"):
        scores.scores(Net(dropout=0.1), [drawn], ids, mask, score)
