"""ETPO's loop: its update against the parts, convergence, exactness over passes and ranks, resuming, edges."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from safetensors.torch import load_file

from hapo.engines.trl.finite import NotFiniteError
from hapo.loops.etpo import ETPO, update
from hapo.loops.networks import WholeNetworks, hidden_states
from hapo.loops.options import ETPOConfig
from hapo.loops.packed import pack
from hapo.loops.turns import AgentTurn, Sampling, Segment, sample
from hapo.parts import soft_q
from hapo.tasks.environments import load_environment
from hapo.tasks.environments.speech import Speech
from tests.engines import tiny
from tests.loops import small

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
CPU = Accelerator(cpu=True)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", **options})


def segments(loop: ETPO) -> list[Segment]:
    """Three: two turns and on; a turn of one token that ends its episode; an empty turn in the middle."""
    encode = lambda text: tiny.tokenizer()(text)["input_ids"]  # noqa: E731
    long = [*encode("1+2="), *encode("abc"), *encode("3="), *encode("de"), *encode("5=")]
    short = [*encode("2+2="), 1]
    gap = [*encode("7="), *encode("ab"), *encode("="), *encode("="), *encode("c")]
    return [
        Segment(
            0,
            0,
            "1+2=",
            long,
            0,
            [AgentTurn(4, long[4:7], "abc", 0.5, True), AgentTurn(9, long[9:11], "de", -1.0, True)],
        ),
        Segment(1, 0, "2+2=", short, 0, [AgentTurn(4, [1], "", 1.0, False)]),
        Segment(
            2,
            0,
            "7=",
            gap,
            0,
            [
                AgentTurn(2, gap[2:4], "ab", 0.2, True),
                AgentTurn(5, [], "", 9.0, True),
                AgentTurn(6, gap[6:], "c", 0.7, False),
            ],
        ),
    ]


def gradients(loop: ETPO, of: list[Segment], **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What an update would give to the optimisers, and its metrics."""
    for name in ("policy", "critic"):
        loop.optimisers[name] = torch.optim.SGD(loop.networks.parameters(name).values(), lr=1.0)
    before = small.weights(loop)
    args = replace(loop.args, max_grad_norm=1e9, **changes)
    made = update(loop.networks, loop.optimisers, of, args, CPU, pad=0)
    return {name: before[name] - x for name, x in small.weights(loop).items() if "target" not in name}, made


@pytest.mark.parametrize("critic", ["logits", "residual"])
@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_an_update_is_the_losses_of_the_parts(critic, lam):
    loop = small.run(critic=critic, lam=lam, gamma=0.9)
    with torch.no_grad():
        for i, name in enumerate(("policy", "critic", "target")):
            for x in loop.networks.parameters(name).values():
                x.add_(0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i)))
    of = segments(loop)
    models = loop.networks._models
    logits = {}
    for name, model in models.items():
        model.zero_grad()
        rows = []
        for one in of:  # each segment alone, by the whole model
            rows.append(model(torch.tensor([one.ids])).logits[0])
        logits[name] = rows
    q, slow = (
        [
            x - r.detach() if critic == "residual" else x
            for x, r in zip(logits[name], logits["reference"], strict=True)
        ]
        for name in ("critic", "target")
    )
    count = sum(len(turn.ids) for one in of for turn in one.turns)
    losses = []
    for r, one in enumerate(of):
        turns, length = len(one.turns), max(len(turn.ids) for turn in one.turns)
        at = torch.zeros(turns + 1, length, dtype=torch.long)
        mask = torch.zeros(turns, length, dtype=torch.bool)
        action = torch.zeros(turns, length, dtype=torch.long)
        for s, turn in enumerate(one.turns):
            n = len(turn.ids)
            at[s] = turn.start - 1
            at[s, :n] += torch.arange(n)
            mask[s, :n], action[s, :n] = True, torch.tensor(turn.ids, dtype=torch.long)
        at[turns] = len(one.ids) - 1
        reward = torch.tensor([turn.reward for turn in one.turns])
        goes_on = torch.tensor([turn.goes_on for turn in one.turns])
        policy, ref, fast, target = (x[r][at] for x in (logits["policy"], logits["reference"], q, slow))
        value, kl = soft_q.soft_value(target, policy, ref, 0.1)
        y = soft_q.lambda_targets(value, kl, reward, goes_on, mask, beta=0.1, gamma=0.9, lam=lam)
        losses.append(soft_q.policy_loss(policy[:-1], fast[:-1].detach(), ref[:-1], mask, beta=0.1, count=count))
        losses.append(soft_q.critic_loss(fast[:-1], action, y, mask, count=count))
    sum(losses).backward()
    expected = {
        f"{name}.{key}": p.grad for name in ("policy", "critic") for key, p in models[name].named_parameters()
    }
    got, made = gradients(loop, of)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], atol=2e-6, rtol=1e-4)
    assert made["loss/policy"] == pytest.approx(sum(losses[::2]).item(), abs=1e-6)
    assert made["loss/critic"] == pytest.approx(sum(losses[1::2]).item(), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("adapters", [False, True])
def test_gradients_do_not_depend_on_passes_or_order(rows, adapters):
    runs = [small.run(lora() if adapters else None) for _ in range(2)]
    (whole, a), (split, b) = (
        gradients(loop, of, per_device_train_batch_size=n)
        for loop, of, n in ((runs[0], segments(runs[0]), 8), (runs[1], segments(runs[1])[::-1], rows))
    )
    assert any(grad.abs().max() > 1e-4 for grad in whole.values())
    for name, grad in whole.items():
        torch.testing.assert_close(split[name], grad, atol=1e-6, rtol=1e-4)
    assert a == pytest.approx(b, abs=1e-6, rel=1e-5)


@pytest.mark.xdist_group("two_ranks")
def test_two_ranks_take_the_step_of_one(two_ranks):
    alone, both = small.first_update(), load_file(two_ranks / "etpo.safetensors")
    assert alone.keys() == both.keys()
    for name, x in alone.items():
        torch.testing.assert_close(both[name], x, atol=2e-6, rtol=1e-4)


def test_adapters_are_four_networks_on_one_base():
    loop = small.run(lora())
    ids, attention = torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.long)
    at = torch.tensor([[0, 0], [1, 2]])

    def states() -> dict[str, torch.Tensor]:
        found = {}
        for name in ("policy", "critic", "target", "reference"):
            with torch.no_grad(), loop.networks.use(name) as net:
                found[name] = hidden_states(net, ids, attention, at)
        return found

    one = states()
    plain = tiny.model()(ids, output_hidden_states=True).hidden_states[-1][0, 1:]
    torch.testing.assert_close(one["reference"], plain)
    assert torch.equal(one["policy"], one["critic"]) and torch.equal(one["policy"], one["target"])
    assert not torch.equal(one["policy"], one["reference"])
    bytes_of = sum(p.numel() for p in tiny.model().parameters())
    assert sum(p.numel() for p in loop.networks._model.parameters()) < 1.5 * bytes_of
    next(loop.steps())
    two = states()
    assert torch.equal(two["reference"], one["reference"])
    for name in ("policy", "critic", "target"):
        assert not torch.equal(two[name], one[name]), name
    assert not torch.equal(two["policy"], two["critic"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 cannot be honoured"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] cannot be honoured"),
        ({"target_modules": ["lm_head"]}, "output layer cannot have an adapter"),
    ],
)
def test_adapters_that_cannot_be_shared_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small.run(lora(**options))


def test_the_target_follows_the_critic():
    loop = small.run(polyak=0.75)
    start = {name: x.detach().clone() for name, x in loop.networks.parameters("target").items()}
    next(loop.steps())
    critic, target = (loop.networks.parameters(name) for name in ("critic", "target"))
    for name, x in target.items():
        torch.testing.assert_close(x, 0.75 * start[name] + 0.25 * critic[name])


def table_run(target: str, steps: int = 300) -> tuple[WholeNetworks, list[Segment]]:
    """Updates from all answers of two tokens to one prompt, in a model that is a table."""
    encode = tiny.tokenizer()
    prompt, zero, one = (encode(text)["input_ids"][0] for text in "+01")
    model = small.Table((zero, one), len(tiny.ALPHABET) + 2)
    with torch.no_grad():  # rho of the spec's two-token example
        for token, place, row in ((zero, 1, [0.0, 1.0]), (one, 1, [0.5, 0.0])):
            model.head.weight[:, place * model.vocabulary + token] = torch.tensor(row, dtype=torch.float64)
    networks = WholeNetworks(model)
    optimisers = {
        name: torch.optim.AdamW(networks.parameters(name).values(), lr=0.05, weight_decay=0.0)
        for name in ("policy", "critic")
    }
    args = ETPOConfig(beta=0.5, polyak=0.8, gamma=0.5, target=target)
    of = [
        Segment(0, 0, "+", [prompt, a, b], 0, [AgentTurn(1, [a, b], "", float(small.TABLE[i, j]), False)])
        for i, a in enumerate((zero, one))
        for j, b in enumerate((zero, one))
    ]
    for step in range(steps):
        for optimiser in optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = 0.05 * (1 - step / steps)
        update(networks, optimisers, of, args, CPU, pad=0, step=step + 1)
    return networks, of


def joint(networks: WholeNetworks, of: list[Segment]) -> torch.Tensor:
    """Probabilities of the four answers."""
    packed = pack(of, 0, torch.device("cpu"))
    with networks.use("policy") as net:
        hidden = hidden_states(net, packed.ids, packed.attention, packed.at)
    logp = networks.logits("policy", hidden).log_softmax(-1).gather(-1, packed.action[:, None])
    return logp.view(4, 2).sum(1).exp().view(2, 2).detach()


def test_on_a_table_the_loop_finds_the_optimal_policy_and_the_released_loss_does_not():
    """pi* = rho exp(Q / beta) / Z of whole actions, as the spec prints it."""
    best = torch.tensor([[0.436830, 0.160701], [0.371939, 0.030531]], dtype=torch.float64)
    networks, of = table_run("kl_ref")
    torch.testing.assert_close(joint(networks, of), best, atol=1e-3, rtol=0)
    networks, of = table_run("released", steps=100)
    assert (joint(networks, of) - best).abs().max() > 0.05


def test_agents_act_in_their_environments_and_take_up_a_new_episode():
    loop = small.run(environments=2, turns_per_update=3, max_steps=2)
    seen: list[Segment] = []
    metrics = list(loop.steps(lambda of, packed, states: seen.extend(of)))
    turns = [turn for one in seen for turn in one.turns]
    assert len(turns) == 2 * 3 * 2
    for one in seen:
        assert one.prompt == tiny.tokenizer().decode(one.ids[: len(tiny.tokenizer()(one.prompt)["input_ids"])])
        for turn, after in zip(one.turns, [*one.turns[1:], None], strict=True):
            assert one.ids[turn.start : turn.start + len(turn.ids)] == turn.ids
            assert len(turn.ids) <= 3 and (turn.goes_on or after is None)
            if turn.goes_on and after is not None:
                said = one.ids[turn.start + len(turn.ids) : after.start]
                assert tiny.tokenizer().decode(said) == f"{len(turn.text)}="
    begun = {(one.agent, one.number) for one in seen}
    assert len(begun) > 2  # a new episode began
    assert sum(line["episodes"] for line in metrics) == sum(not turn.goes_on for turn in turns)
    first = {one.number: one.prompt for one in seen if one.agent == 0}
    assert len(set(first.values())) == len(first)


def test_what_is_sampled_depends_on_no_other_agent():
    contexts = [[4, 5, 6], [7, 8], [9, 10, 11, 12]]
    noise = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how = Sampling(max_new_tokens=5, temperature=1.0, top_k=0, context=64, ends=(1,), pad=0)
    together = sample(tiny.model(), contexts, how, noise)
    alone = [sample(tiny.model(), [c], how, noise[i : i + 1])[0] for i, c in enumerate(contexts)]
    assert together == alone
    model, ids = tiny.model(), []
    for t in range(len(together[0])):  # by hand, without a cache
        p = model(torch.tensor([[4, 5, 6, *ids]])).logits[0, -1].double().softmax(-1)
        ids.append(int((p.cumsum(-1) < noise[0, t]).sum()))
    assert ids == together[0]


@pytest.mark.parametrize(("temperature", "top_k", "rank"), [(0.0, 0, 1), (1.0, 1, 1), (1.0, 3, 3)])
def test_greedy_and_top_k(temperature, top_k, rank):
    how = Sampling(max_new_tokens=1, temperature=temperature, top_k=top_k, context=64, ends=(1,), pad=0)
    noise = torch.linspace(0, 0.999, 50, dtype=torch.float64)[:, None]
    taken = {row[0] for row in sample(tiny.model(), [[4, 5]] * 50, how, noise)}
    best = tiny.model()(torch.tensor([[4, 5]])).logits[0, -1].topk(rank).indices.tolist()
    assert taken <= set(best) and best[0] in taken


def test_a_turn_that_does_not_fit_is_cut_and_its_episode_truncated():
    endless = small.task(max_turns=99, enough=99)
    loop = small.run(where=endless, context_length=10, turns_per_update=4, environments=1, max_steps=1)
    seen: list[Segment] = []
    next(loop.steps(lambda of, packed, states: seen.extend(of)))
    full = [one for one in seen if len(one.ids) == 10]
    assert full and len(seen) > 1 and all(len(one.ids) <= 10 for one in seen)
    for one in full:
        packed = pack([one], 0, torch.device("cpu"))
        assert one.turns[-1].goes_on  # the value of the state that it was cut in is the bootstrap
        assert packed.at[1, -1] == 9 and not packed.taken[-1]


def test_tokens_are_those_of_prompts_and_turns():
    loop = small.run(where=small.task(enough=99), max_steps=2)
    seen: list[Segment] = []
    list(loop.steps(lambda of, packed, states: seen.extend(of)))
    said = sum(
        len(tiny.tokenizer()(f"{len(t.text)}=")["input_ids"]) for one in seen for t in one.turns if t.goes_on
    )
    assert said and loop.num_tokens == sum(len(one.ids) - one.begun for one in seen) - said


def resumed(folder, steps: int, **options: Any) -> tuple[ETPO, list[dict[str, float]]]:
    loop = small.run(**options, max_steps=steps)
    loop.load(folder)
    return loop, list(loop.steps())


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_has_the_same_bits(tmp_path, adapters):
    config = lora() if adapters else None
    whole = small.run(config, max_steps=4)
    metrics = list(whole.steps())
    part = small.run(lora() if adapters else None, max_steps=2)
    list(part.steps())
    part.save(tmp_path / "checkpoint")
    again, rest = resumed(tmp_path / "checkpoint", 4, peft_config=lora() if adapters else None)
    assert rest == metrics[2:]
    for name, x in small.weights(whole).items():
        assert torch.equal(x, small.weights(again)[name]), name
    assert again.num_tokens == whole.num_tokens and [a.state() for a in again.agents] == [
        a.state() for a in whole.agents
    ]


def test_a_checkpoint_holds_no_code_and_says_what_does_not_fit(tmp_path):
    loop = small.run(max_steps=1)
    list(loop.steps())
    loop.save(tmp_path / "c")
    with pytest.raises(ValueError, match=r"was written with beta=0.1, not 0.2"):
        small.run(beta=0.2).load(tmp_path / "c")
    with pytest.raises(ValueError, match="another model or adapter"):
        small.run(lora()).load(tmp_path / "c")
    for file in (tmp_path / "c").glob("*.pt"):
        torch.load(file, weights_only=True)
    state = json.loads((tmp_path / "c/etpo_state.json").read_text())
    state["agents"]["0"]["context"][0] += 1
    (tmp_path / "c/etpo_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="agent 0: the environment does not answer as it did"):
        small.run().load(tmp_path / "c")
    (tmp_path / "c/etpo_state.json").unlink()
    with pytest.raises(ValueError, match="cut short"):
        small.run().load(tmp_path / "c")


def test_held_out_episodes_are_the_same_each_time_and_in_order():
    loop = small.run()
    scores = loop.measure(1.0, samples=3, batch=4)
    assert [len(of) for of in scores] == [3] * 5 and {x for of in scores for x in of} <= {0.0, 1.0}
    assert loop.measure(1.0, samples=3, batch=15) == scores
    state = [agent.state() for agent in loop.agents]
    assert [agent.state() for agent in small.run().agents] == state  # measuring moves nothing


def test_a_gradient_that_is_not_finite_stops_the_run():
    loop = small.run()
    of = segments(loop)
    of[1].turns[0] = replace(of[1].turns[0], reward=math.nan)
    with pytest.raises(NotFiniteError, match="gradient norm"):
        update(loop.networks, loop.optimisers, of, loop.args, CPU, pad=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be >= 0, got -1"),
        ({"polyak": 1.0}, r"polyak must be in \[0, 1\), got 1"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
        ({"environments": 0}, "environments must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"context_length": 1}, "context_length must be >= 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0"),
        ({"target": "best"}, "target must be one of kl_ref, entropy, released, got 'best'"),
        ({"critic": "head"}, "critic must be one of logits, residual, got 'head'"),
        ({"lam": 0.5, "temperature": 0.5}, "set temperature to 1 and top_k to 0"),
        ({"environment_options": "no"}, "environment_options must be a mapping, got 'no'"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ETPOConfig(**{**small.OPTIONS, **options})


def test_defaults_are_those_of_the_authors_code():
    args = ETPOConfig()
    assert (args.beta, args.gamma, args.polyak, args.huber_delta) == (0.01, 0.99, 0.995, 10.0)
    assert (args.learning_rate, args.max_grad_norm, args.environments, args.turns_per_update) == (1e-6, 10.0, 8, 2)
    assert (args.temperature, args.top_k, args.max_new_tokens) == (0.5, 50, 256)
    assert (args.lam, args.critic, args.target) == (0.0, "logits", "kl_ref")
    assert args.max_steps * args.turns_per_update == 500


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chess", {}, "no environment 'chess'; known: addition, code"),
        ("tests.loops.small:nothing", {}, "cannot be loaded"),
        ("tests.loops.small:load", {"colour": 1}, "with the options"),
        (":", {}, "must be MODULE:FUNCTION"),
        ("json:", {}, "must be MODULE:FUNCTION"),
        (".small:load", {}, "must be MODULE:FUNCTION"),
        ("json:dumps", {}, "its function takes seed, train_size and eval_size"),
        ("tests.loops.test_etpo:rows_alone", {}, "must give a class and two data sets, got a str"),
    ],
)
def test_environments_that_cannot_be_had_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_environment(name, seed=0, train_size=4, eval_size=2, options=options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_networks_in_half_precision_are_refused(dtype):
    model = torch.nn.Linear(1, 1).to(dtype)
    with pytest.raises(ValueError, match="16 cannot be honoured: a target critic in half precision never moves"):
        WholeNetworks(model)


def rows_alone(seed: int, train_size: int, eval_size: int) -> str:
    return "ab"


def test_messages_without_a_chat_template_are_refused():
    speech = Speech(SimpleNamespace(chat_template=None), ())
    with pytest.raises(ValueError, match="no chat template: take a model"):
        speech.prompt([{"role": "user", "content": "a"}], None)


def test_an_environment_of_ones_own():
    found = load_environment("tests.loops.small:load", seed=0, train_size=4, eval_size=2, options={"max_turns": 2})
    environment = found.make()
    assert environment.max_turns == 2 and environment.reset(**found.train[1]) == "a"


@pytest.mark.parametrize("target", ["kl_ref", "entropy", "released"])
@pytest.mark.parametrize("critic", ["logits", "residual"])
def test_what_is_recorded_of_a_token_is_what_the_update_does_with_it(target, critic):
    """push = -N dL_pi / dz of the taken token, by the head's bias in a model that has one."""
    loop = small.run(target=target, critic=critic, max_grad_norm=1e9)
    head = loop.networks._models["policy"].lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    seen: list[Any] = []
    of = [segments(loop)[1]]  # one token: the gradient of the bias is that of its logits
    got = {}
    step = loop.optimisers["policy"].step
    loop.optimisers["policy"].step = lambda: got.setdefault("bias", head.bias.grad.clone()) is None or step()
    update(loop.networks, loop.optimisers, of, loop.args, CPU, pad=0, see=lambda *of_pass: seen.append(of_pass[2]))
    (states,) = seen
    assert float(states.push) == pytest.approx(-got["bias"][1].item(), abs=1e-6)
    assert int(states.other) != 1 and states.q_other.isfinite().all()
