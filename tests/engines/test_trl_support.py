"""Truncated sampling in the TRL engine: log-probs of both sides of a ratio over the tokens that were left."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from trl.generation.vllm_generation import extract_logprobs

import hapo
from hapo.engines.trl import vllm
from hapo.engines.trl.gather import concat_rows
from hapo.engines.trl.support import LogpOver, decide, over, support_of
from hapo.samplers.decoding import MOST_SUPPORT
from hapo.scoring import score_tokens
from tests.engines import tiny
from tests.engines.test_trl_environments import rollout, trained
from tests.engines.test_trl_true import own_generate

TRUNCATED = {"top_p": 0.9, "top_k": 20, "temperature": 0.9}
RULE = {"method": "hapo", "method_options": {"temperature": {"rule": "zscore", "tau": 0.1}}}
KEPT, GAP = "sampler_weight/mean", "sampling/sampling_logp_difference/mean"


def run(folder, **options):
    """Two rollouts of an unmoved policy, the second with a temperature rule, and what was logged."""
    still = {
        "learning_rate": 0.0,
        "steps_per_generation": 1,
        "num_iterations": 2,
        "per_device_train_batch_size": 16,
    }
    net = tiny.model()
    if "beta" in options:  # TRL loads the reference from there
        net.save_pretrained(folder / "model")
        net = type(net).from_pretrained(folder / "model")
    trainer = tiny.trainer(folder, net, **{**still, **RULE, **TRUNCATED, **options})
    trainer.train()
    return trainer, [line for line in trainer.state.log_history if GAP in line]


def replayed(trainer):
    """exp(scored - recorded) of the sampler's log-probs, scored with its temperature."""
    rule, stats = trainer.method.temperature_rule, trainer._sampled_with
    inputs = trainer._buffered_inputs[0]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    mask = inputs["completion_mask"].bool()
    options = {"t_base": trainer.temperature, "factor": lambda entropy: rule(entropy, stats)}
    with torch.no_grad():
        scores = score_tokens(trainer.model, ids, attention, mask, support=inputs.get("support"), **options)
    return (scores.sampler_logp - inputs["sampling_per_token_logps"])[mask].exp()


@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "max_num_gen_batches": 3}, {"tokens_per_pass": 64}])
def test_ratios_of_an_unmoved_policy_are_one(tmp_path, options):
    """And without the supports the sampler's are the share that truncation leaves."""
    trainer, lines = run(tmp_path / "with", **options)
    assert trainer.args.sampling_support is True
    assert lines[0][GAP] < 1e-5  # no statistics yet: T_base
    assert [line["ratio/mean"] for line in lines] == pytest.approx([1, 1], abs=1e-4)
    assert (replayed(trainer) - 1).abs().max() < 1e-4
    assert lines[0][KEPT] == pytest.approx(1, abs=1e-4)
    assert lines[1][KEPT] == pytest.approx(1, abs=0.05)  # of a hundred draws
    if "beta" in options:
        assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    trainer, lines = run(tmp_path / "without", sampling_support=False, **options)
    assert "support" not in trainer._buffered_inputs[0]
    assert replayed(trainer).mean() < 0.95
    assert max(line[KEPT] for line in lines) < 0.95


def test_turns_of_an_episode_keep_their_supports(tmp_path):
    """What the environment says between them is over itself alone, and counts nowhere."""
    trainer = trained(tmp_path, **TRUNCATED)
    output, _, _ = rollout(trainer)
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    told = output["completion_mask"].bool() & ~mask
    assert told.any()
    assert torch.equal(output["support"][told][:, 0], output["completion_ids"][told].int())
    assert (output["support"][told][:, 1:] == -1).all()
    gap = (output["sampling_per_token_logps"] - output["old_per_token_logps"])[mask].abs()
    assert gap.max() < 1e-4


def test_supports_go_with_their_numbers():
    """Through cuts, joins and other processes, and into a tensor."""
    drawn = over([[-0.1, -0.2], [-0.3]], torch.tensor([[[4, 5, -1], [6, -1, -1]], [[7, 8, 9], [-1, -1, -1]]]))
    assert drawn == [[-0.1, -0.2], [-0.3]]
    drawn = pickle.loads(pickle.dumps(copy.deepcopy(drawn)))
    drawn[1] += [0.0, 0.0, drawn[0][0]]  # two tokens of a tool, then another turn
    ids = torch.tensor([[5, 6, 0, 0], [9, 1, 2, 4]])
    expected = [[[4, 5, -1], [6, -1, -1], [0, -1, -1], [0, -1, -1]]]
    expected += [[[7, 8, 9], [1, -1, -1], [2, -1, -1], [4, 5, -1]]]
    assert support_of(drawn, [[1, 1], [1, 0, 0, 1]], ids).tolist() == expected
    with pytest.raises(RuntimeError, match="token 1 of response 1 came without the tokens that it was drawn from"):
        support_of(drawn, None, ids)
    assert isinstance(drawn[0][0], LogpOver)


def test_supports_of_unlike_sizes_are_padded_with_nothing():
    parts = [
        {"support": torch.zeros(1, 2, 3, dtype=torch.int32)},
        {"support": torch.ones(1, 3, 1, dtype=torch.int32)},
    ]
    joined = concat_rows(parts)["support"]
    assert joined.tolist() == [[[0, 0, 0], [0, 0, 0], [-1] * 3], [[1, -1, -1]] * 3]


def test_an_engine_in_this_process_hands_its_masks_on():
    """TRL's own reading of vLLM's outputs gives the log-probs with their supports."""

    def output(tokens, sets):
        logps = [{t: SimpleNamespace(logprob=-0.1 * t, rank=1)} for t in tokens]
        mask = SimpleNamespace(token_ids=sets)
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logps, sampling_mask=mask)])

    llm = SimpleNamespace(generate=lambda prompts: [output([4, 5], [[4, 9], [5]]), output([6], [[8, 6]])])
    vllm.take_supports(SimpleNamespace(mode="colocate", llm=llm))
    logps = [[x[0] for x in row] for row in extract_logprobs(llm.generate([[1], [2]]))[0]]
    assert logps == [[-0.4, -0.5], pytest.approx([-0.6])]
    support = support_of(logps, None, torch.tensor([[4, 5], [6, 0]]))
    assert support.tolist() == [[[4, 9], [5, -1]], [[8, 6], [0, -1]]]


def test_a_server_is_asked_where_it_tells_its_masks():
    """The answer's shape is that of vLLM 0.32's /inference/v1/generate; the rule goes where it reads it."""
    asked = []

    def post(url, json):
        asked.append((url, json))
        content = [{"token_id": 4, "logprob": -0.4, "rank": 1, "top_logprobs": []}]
        choice = {"token_ids": [4], "logprobs": {"content": content}, "sampling_mask": [[4, json["token_ids"][0]]]}
        return {"choices": [choice] * json["sampling_params"]["n"]}

    client = SimpleNamespace(model="m", base_url="http://server", _post=post)
    generation = SimpleNamespace(mode="server", vllm_client=client, generation_kwargs={})
    vllm.take_supports(generation)
    stats = hapo.EntropyStats(pivot=0.3, sigma=0.5, h_max=0.4, h_min=-0.9)
    vllm.send_rule(generation, hapo.method("hapo"), stats, support=True)
    answer = client.generate(
        prompts=[[7], [8]], features=None, n=2, top_k=20, structured_outputs_regex=None,
        generation_kwargs=generation.generation_kwargs,
    )  # fmt: skip
    assert answer["completion_ids"] == [[4]] * 4
    assert [row[0][0].support for row in answer["logprobs"]] == [[4, 7], [4, 7], [4, 8], [4, 8]]
    assert {url for url, _ in asked} == {"http://server/inference/v1/generate"}
    assert asked[0][1]["sampling_params"]["extra_args"]["hapo_pivot"] == 0.3


@pytest.mark.parametrize(
    ("told", "status", "lacking"),
    [
        ({"return_sampling_mask": True}, 400, None),
        ({}, 400, "--return-sampling-mask (vLLM"),
        ({"return_sampling_mask": True}, 403, "--enable-scale-out (vLLM"),
        ({}, 404, "--return-sampling-mask --enable-scale-out (vLLM"),
    ],
)
def test_a_server_says_whether_it_tells_them(told, status, lacking):
    """It makes masks, and its endpoint reads the request, which is wrong; without --enable-scale-out it answers 403."""
    asked = []
    client = SimpleNamespace(
        get_server_info=lambda: {"model_config": told},
        base_url="http://server",
        session=SimpleNamespace(post=lambda url, json: asked.append(url) or SimpleNamespace(status_code=status)),
    )
    found = [*vllm.against_server(SimpleNamespace(mode="server", vllm_client=client), is_main=True)]
    assert asked == ["http://server/inference/v1/generate"]
    assert len(found) == (lacking is not None)
    assert all(f"start it with {lacking}" in why for why in found)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"top_p": 1.0, "top_k": 0}, "no token is left out: set top_k, top_p or min_p"),
        ({"use_transformers_continuous_batching": True}, r"generate_batch\(\) tells none"),
        ({"top_k": MOST_SUPPORT + 1}, f"top_k={MOST_SUPPORT + 1} leaves too many .* at most {MOST_SUPPORT}"),
        (
            {"top_k": 0, "net": {"vocab_size": MOST_SUPPORT + 1}},
            f"of {MOST_SUPPORT + 1} tokens too many .* set top_k",
        ),
        ({"rollout_func": lambda prompts, trainer: {}}, "a rollout_func samples by itself"),
        ({"use_vllm": True, "top_k": 0}, "vLLM tells it with a bound on its size only: set top_k"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(tmp_path, options, why):
    options = {**TRUNCATED, "method": "dapo", "sampling_support": True, **options}
    net = tiny.model(**options.pop("net", {}))
    with pytest.raises(ValueError, match=why):
        tiny.trainer(tmp_path, net, **options)


@pytest.mark.parametrize(
    ("asked", "reasons", "why"),
    [
        (
            None,
            ["this engine tells none: take another"],
            "over what is left, and this engine tells none: take ano",
        ),
        (False, [], "and sampling_support=False rules them out: leave it away; or score the rollouts"),
    ],
)
def test_rollouts_of_truncated_draws_go_unscored_with_their_supports_alone(asked, reasons, why):
    args = SimpleNamespace(top_p=0.9, top_k=20, min_p=None, score_rollouts=False)
    assert decide(None, args, [])
    with pytest.raises(ValueError, match=f"score_rollouts=False with top_p=0.9, top_k=20 takes .*{why}"):
        decide(asked, args, reasons)
    assert not decide(asked, SimpleNamespace(top_p=1.0, top_k=0, min_p=None, score_rollouts=False), reasons)


def test_where_it_cannot_be_had_the_weight_stays_and_a_word_is_said(tmp_path):
    options = {**TRUNCATED, "method": "dapo", "use_transformers_continuous_batching": True}
    with pytest.warns(UserWarning, match=r"top_p=0.9, top_k=20: .* the share that truncation leaves, not 1"):
        trainer = tiny.trainer(tmp_path, **options)
    assert trainer.args.sampling_support is False


def test_a_generate_of_the_user_s_own_tells_none(tmp_path):
    options = {"method": "dapo", "max_steps": 1, **TRUNCATED}
    tiny.trainer(tmp_path, own_generate(tiny.model()), **options).train()
    with pytest.raises(ValueError, match=r"told nothing of its draws: .* set sampling_support=False"):
        tiny.trainer(tmp_path, own_generate(tiny.model()), sampling_support=True, **options).train()
