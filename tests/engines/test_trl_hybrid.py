"""Demonstrations beside rollouts: L = (1 - mu) L_RL + mu L_E, the same steps after a resume, and what is refused."""

import copy
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import hapo
from hapo.engines.trl.demonstrations import Conversation, Demonstrations, Encoder, Weight, conversations
from hapo.parts.rank import expected_rank, target_rank
from hapo.trl import HAPOTrainer
from tests.engines import fixed_rollout, supervised_run, tiny
from tests.two_ranks import SPLIT

ROWS = SPLIT["hybrid"]["demonstrations"]
EXACT = {"estimator": "exact", "base_weight": 1}


def of_demonstrations(trainer, step: int, weights: dict, t_base: float) -> tuple[float, dict]:
    """Loss and gradient of a step's demonstrations by plain logits, one after the other."""
    net, of_all = tiny.model(), trainer._demonstrations
    net.load_state_dict(weights)
    rows = of_all.of_step(step)
    width = max(len(row.completion) for row in rows)
    fields = {name: [] for name in ("mask", "logp", "entropy", "rank", "expected_rank")}
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.completion]])
        logits = net(input_ids=ids).logits[:, len(row.prompt) - 1 : -1] / t_base
        targets, log_p = ids[:, len(row.prompt) :], logits.log_softmax(-1)
        made = {
            "mask": torch.ones_like(targets, dtype=torch.bool),
            "logp": log_p.gather(-1, targets[..., None])[..., 0],
            "entropy": -(log_p.exp() * log_p).sum(-1).detach(),
            "rank": target_rank(logits.detach(), targets),
            "expected_rank": expected_rank(logits.detach()),
        }
        for name, x in made.items():
            fields[name].append(torch.nn.functional.pad(x, (0, width - x.shape[1])))
    loss = of_all.method.loss(hapo.TokenBatch(**{name: torch.cat(x) for name, x in fields.items()})).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize(("method", "options"), [("sft", {}), ("chord_phi", {}), ("ranktuner", EXACT)])
def test_the_gradient_is_the_weighted_sum_of_both_each_with_its_own_totals(method, options):
    still = {
        "learning_rate": 0.0,
        "method": "dapo",
        "temperature": 0.7,
        "method_options": {"filter_groups": False},
    }
    plain, of_plain = fixed_rollout.run(8, 2, 4, 1, **still)
    told = {"demonstration_method": method, "demonstration_method_options": options}
    mu = {"0": 0.75, "1": 0.25}
    mixed, trainer = fixed_rollout.run(
        8, 2, 4, 1, demonstrations=ROWS, demonstration_weight=mu, demonstrations_per_step=3, **told, **still
    )
    logs = zip(of_plain.state.log_history, trainer.state.log_history, mu.values(), strict=False)
    for step, (before, log, weight) in enumerate(logs):
        loss, gradient = of_demonstrations(trainer, step, mixed.weights[step], 0.7)
        for name, x in mixed.steps[step].items():
            expected = (1 - weight) * plain.steps[step][name] + weight * gradient[name]
            torch.testing.assert_close(x, expected, rtol=1e-6, atol=2e-6)
        assert max(x.abs().max() for x in gradient.values()) > 1e-3
        assert log["demonstration_loss"] == pytest.approx(loss, abs=1e-5)
        assert log["demonstration_weight"] == weight
        assert log["policy_loss"] == pytest.approx(before["loss"], abs=1e-6)
        assert log["loss"] == pytest.approx((1 - weight) * before["loss"] + weight * loss, abs=1e-5)
        assert ("demonstration_token_weight" in log) == (method != "sft")
        same = {k for k in before if k.startswith(("reward", "completions", "entropy", "num_tokens", "groups"))}
        assert {k: log[k] for k in same} == {k: before[k] for k in same}  # they enter no statistic


def test_without_a_push_of_the_rollouts_it_is_supervised_trainer_s_gradient(tmp_path):
    """Where all rewards are equal, every advantage is 0."""
    data = Dataset.from_list(ROWS)
    _, alone, _ = supervised_run.run(tmp_path, method="dft", dataset=data, rows=9)
    mixed, _ = fixed_rollout.run(
        16, 1, 4, 1, reward=lambda completions, **_: [1.0] * len(completions), method="dapo", max_steps=1,
        method_options={"filter_groups": False}, demonstrations=data, demonstration_method="dft",
        demonstration_weight=0.5, demonstrations_per_step=len(data),
    )  # fmt: skip
    for name, x in mixed.steps[0].items():
        torch.testing.assert_close(x, 0.5 * alone[name], rtol=0, atol=1e-6)
    assert max(x.abs().max() for x in alone.values()) > 1e-3


def test_with_a_weight_of_0_it_is_the_plain_method_bit_for_bit():
    plain, of_plain = fixed_rollout.run(8, 1, 2, 1, method="egspo")
    mixed, trainer = fixed_rollout.run(8, 1, 2, 1, method="egspo", demonstrations=ROWS, demonstration_weight=0.0)
    for one, other in zip(plain.steps, mixed.steps, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (of_plain, trainer)]
    assert losses[0] == losses[1]
    assert trainer._demonstrations.per_step == 2  # one for each group


def hybrid(folder, **changes):
    told = {
        "demonstrations": ROWS, "demonstration_weight": {"0": 0.5, "4": 0.1}, "demonstration_method": "chord_phi",
        "method": "egspo", "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    return tiny.trainer(folder, **{**told, **changes})


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A whole run, with a checkpoint inside its second rollout batch."""
    trainer = hybrid(tmp_path_factory.mktemp("hybrid"))
    trainer.train()
    return trainer


def test_a_run_resumed_inside_a_rollout_has_equal_bits(begun, tmp_path):
    again = hybrid(tmp_path)
    again.train(resume_from_checkpoint=f"{begun.args.output_dir}/checkpoint-3")
    for one, other in zip(begun.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    names = ("loss", "policy_loss", "demonstration_loss", "demonstration_nll", "demonstration_token_weight")
    logs = [[{k: log[k] for k in names} for log in t.state.log_history if "loss" in log] for t in (begun, again)]
    assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"demonstration_weight": 0.5}, "demonstration_weight"),
        ({"demonstration_method": "sft"}, "demonstration_method"),
        ({"demonstrations": ROWS[:-1]}, "demonstrations: '9 rows"),
        ({"demonstrations_per_step": 7}, "with other demonstrations .demonstrations_per_step: 4 there, 7 here"),
    ],
)
def test_a_checkpoint_of_other_demonstrations_is_refused(begun, tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        hybrid(tmp_path, **changes).train(resume_from_checkpoint=f"{begun.args.output_dir}/checkpoint-3")


CHAT = (
    "{% for m in messages %}{{ '=' + m.content + eos_token if m.role == 'assistant' else m.content }}{% endfor %}"
    "{{ '=' if add_generation_prompt else '' }}"
)


def test_messages_go_through_the_chat_template_and_an_adapter_learns_from_them(tmp_path):
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = CHAT
    said = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    trainer = HAPOTrainer(
        tiny.model(), tiny.count_digits, tiny.config(tmp_path, max_steps=1), train_dataset=tiny.data(),
        processing_class=tokenizer, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"),
        demonstrations=Dataset.from_list([{"messages": said}]),
    )  # fmt: skip
    (one, two) = trainer._demonstrations.of_step(0)  # one for each group
    assert one == two and tokenizer.decode(one.prompt) == "1+1=" and tokenizer.decode(one.completion) == "2<eos>"
    assert trainer._demonstrations.weight.at(0) == 0.1  # CHORD's where none is given
    trainer.train()
    assert trainer.state.log_history[0]["demonstration_nll"] > 0
    assert any(p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)


def demonstrations(rows=ROWS, per_step=4, seed=0) -> Demonstrations:
    encode = Encoder(tiny.tokenizer(), 64)
    method = hapo.method("sft")
    return Demonstrations(
        conversations(rows), encode, method, Weight(0.1), per_step=per_step, seed=seed, padding=0
    )


def test_each_pass_over_the_demonstrations_has_each_once_in_an_order_of_its_own():
    taken = [row for step in range(9) for row in map(str, demonstrations().of_step(step))]
    passes = [taken[at : at + 9] for at in range(0, 36, 9)]
    assert all(Counter(one) == Counter(passes[0]) and len(set(one)) == 9 for one in passes)
    assert passes[0] != passes[1]
    other = [row for step in range(9) for row in map(str, demonstrations(seed=1).of_step(step))]
    assert other[:9] != taken[:9]
    assert list(map(str, demonstrations().of_step(7))) == taken[28:32]  # whatever was asked before


def test_the_parts_of_a_step_are_all_of_it_and_its_totals_are_known_beforehand():
    of_all = demonstrations(per_step=5)
    found = []
    for part in range(3):
        for inputs, mask in of_all.passes(2, part, 3, 40, torch.device("cpu")):
            whole = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            read = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).bool()
            assert torch.equal(mask, inputs["completion_mask"].bool())
            found += [ids[row].tolist() for ids, row in zip(whole, read, strict=True)]
    assert sorted(found) == sorted([*row.prompt, *row.completion] for row in of_all.of_step(2))
    totals = of_all.totals(2)
    assert (totals.sequences, totals.tokens) == (5, sum(len(row.completion) for row in of_all.of_step(2)))


@pytest.mark.parametrize(
    ("given", "mu"),
    [
        (0.3, [0.3, 0.3, 0.3]),
        ("0.3", [0.3, 0.3, 0.3]),
        ({"0": 0.8, "10": 0.2}, [0.8, 0.5, 0.2]),
        ('{"5": 0.4, "0": 0}', [0.0, 0.4, 0.4]),
        ({5: 0.4, 10: 0.0}, [0.4, 0.4, 0.0]),
    ],
)
def test_a_weight_is_constant_or_linear_between_steps(given, mu):
    assert [Weight(given).at(step) for step in (0, 5, 10)] == pytest.approx(mu)
    assert Weight(given).at(1000) == Weight(given).at(10)


@pytest.mark.parametrize("given", [1.0, -0.1, 2, "much", {}, {"0": 1.0}, {"begin": 0.1}, {"-1": 0.1}, [0.1]])
def test_a_weight_outside_its_range_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match="demonstration_weight must be"):
        tiny.config(tmp_path, demonstration_weight=given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"demonstration_method": "grpo"}, "demonstration_method: method 'grpo' is a policy method"),
        ({"demonstration_method": "stf"}, "demonstration_method: there is no method 'stf'; did you mean 'sft'"),
        ({"demonstration_method_options": {"estimator": "exact"}}, "method 'sft' has no option 'estimator'"),
        ({"demonstrations_per_step": 0}, "demonstrations_per_step must be a whole number of at least 1, got 0"),
        ({"demonstration_weight": 0.2}, "demonstration_weight=0.2 and no demonstrations"),
        ({"demonstration_method": "dft"}, "demonstration_method='dft' and no demonstrations"),
        ({"demonstrations": []}, "demonstrations: there are none"),
        ({"demonstrations": iter(ROWS)}, "must be a data set with a length"),
        ({"demonstrations": [*ROWS, {"question": "1", "answer": "1"}]}, "row 10: no prompt and completion, .*'question'"),
        ({"demonstrations": [{"prompt": "1", "completion": " "}]}, "row 1: prompt and completion must both be text"),
        ({"demonstrations": [{"messages": [{"role": "user", "content": "1"}]}]}, "end with an answer of the assistant"),
        ({"demonstrations": [{"prompt": "1", "completion": "1" * 70}]}, "has 72 tokens, and the model reads at most 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, **options)


def test_sharded_ranks_are_refused():
    from hapo.engines.trl.demonstrations import demonstrations_of

    with pytest.raises(ValueError, match="FSDP"):
        demonstrations_of(ROWS, SimpleNamespace(), None, ranks=2, sharded=True)


class Templated:
    """A tokenizer of characters, whose template may hide what a prompt ends with once it is answered."""

    eos_token_id = 3

    def __init__(self, hides: bool = False) -> None:
        self.hides = hides

    def apply_chat_template(self, messages, add_generation_prompt=False, **_):
        text = "".join(f"<{m['role'][0]}>{m['content']}." for m in messages) + "<a>" * add_generation_prompt
        return {"input_ids": [ord(c) for c in (text.replace("?", "") if self.hides and "<a>1" in text else text)]}

    def __call__(self, text, add_special_tokens=True):
        merged = re.findall("=1|.", text)  # "=1" is one token
        return {"input_ids": [1] * add_special_tokens + [sum(map(ord, token)) for token in merged]}


ASKED = [{"role": "user", "content": "0?"}]


def test_conversations_are_encoded_as_rollouts_are():
    (one,) = conversations([{"messages": [*ASKED, {"role": "assistant", "content": "1"}]}])
    assert conversations([{"prompt": ASKED, "completion": "1"}]) == [one]
    prompt, completion = Encoder(Templated(), None)(one)
    assert "".join(map(chr, prompt)) == "<u>0?.<a>" and "".join(map(chr, completion)) == "1."
    with pytest.raises(ValueError, match="template writes a prompt otherwise where an answer follows"):
        Encoder(Templated(hides=True), None)(one)


def test_text_is_encoded_as_rollouts_are():
    encode = Encoder(Templated(), None)
    assert encode(Conversation("2", "3")) == ([1, ord("2")], [ord("3"), 3])
    # No rollout has a token across the border.
    assert encode(Conversation("2=", "1")) == ([1, ord("2"), ord("=")], [ord("1"), 3])
