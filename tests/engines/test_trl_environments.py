"""Episodes of several turns in the TRL engine: tokens, masks, rewards, credit."""

import pytest
import torch
from datasets import Dataset

import hapo
from hapo.engines.trl.rows import RolloutRows
from hapo.insight.run import Run
from hapo.parts.turns import turn_index
from hapo.tasks.environments.episodes import episode_reward, turn_reward
from hapo.trl import EnvironmentRollout
from tests.engines import tiny

END = 1


class Digits:
    """Done where a turn has an even number of digits, or after three turns; says which turn it was."""

    max_turns = 3

    def __init__(self):
        self.reward, self.done = 0.0, True

    def reset(self, **row):
        self.reward, self.done, self.taken = 0.0, False, 0
        self.said = []
        return "ab" if row["i"] % 2 else None

    def answer(self, text):
        self.taken += 1
        self.said.append(text)
        good = sum(c.isdigit() for c in text) % 2 == 0
        self.reward = 1.0 if good else -0.5 * self.taken
        self.done = good or self.taken == 3
        return f"={self.taken} "


def trained(folder, reward=episode_reward, **options):
    play = EnvironmentRollout(options.pop("kind_of", Digits), **options.pop("rollout", {}))
    return tiny.trainer(folder, reward=reward, rollout_func=play, **{"max_completion_length": 6, **options})


def rollout(trainer):
    """One rollout batch of 8 rows, as TRL hands it on; its rows without padding."""
    trainer.model.train()
    torch.manual_seed(5)
    rows = [dict(trainer.train_dataset[i // 4]) for i in range(8)]
    output = trainer._rollout(rows)
    plain = []
    for i in range(8):
        keep = output["completion_mask"][i].bool()
        prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()].tolist()
        plain.append((prompt, output["completion_ids"][i][keep].tolist(), output["tool_mask"][i][keep].tolist()))
    return output, plain, rows


def test_the_model_s_tokens_alone_are_learnt_from(tmp_path):
    """What the environment says stands in the context, as text after each turn, and is masked."""
    trainer = trained(tmp_path)
    output, rows, given = rollout(trainer)
    assert {len(row["episode_turns"]) for row in given} >= {1, 2, 3}
    decode = tiny.tokenizer().decode
    for (prompt, ids, own), row, environment in zip(rows, given, trainer.rollout_func._environments, strict=False):
        assert decode(prompt) == row["prompt"] + ("ab" if row["i"] % 2 else "")
        spoken, at = [], 0
        for number, (end, _) in enumerate(row["episode_turns"], 1):
            assert own[at:end] == [1] * (end - at)
            assert end - at <= 6
            spoken.append(decode(ids[at:end], skip_special_tokens=True))
            answer = f"={number} " if number < len(row["episode_turns"]) else ""
            assert decode(ids[end : end + len(answer)]) == answer
            assert own[end : end + len(answer)] == [0] * len(answer)
            at = end + len(answer)
        assert at == len(ids)
        assert spoken == environment.said
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    assert output["sampling_per_token_logps"].masked_fill(mask, 0).abs().max() == 0
    assert torch.allclose(output["sampling_per_token_logps"][mask], output["old_per_token_logps"][mask], atol=1e-4)


def test_the_outcome_is_the_reward_of_the_last_turn(tmp_path):
    output, _, rows = rollout(trained(tmp_path))
    assert output["verdict"].tolist() == [row["episode_turns"][-1][1] for row in rows]
    assert "token_reward" not in output


def test_turns_earn_apart(tmp_path):
    """Advantages are constant inside a turn, of the returns from it on, against the same turn of the group."""
    options = {"advantage": "turn_reward", "finished": "out", "gamma": 0.9, "scale_rewards": "none"}
    trainer = trained(tmp_path, turn_reward, method="grpo", method_options=options, beta=0.0)
    output, _, rows = rollout(trainer)
    trainer._prepare(output)
    batch = RolloutRows.of(output).batch
    turn = turn_index(batch.mask)
    for first in (0, 4):
        group = range(first, first + 4)
        returns = {i: [] for i in group}
        for i in group:
            to_go = 0.0
            for _, reward in reversed(rows[i]["episode_turns"]):
                to_go = reward + 0.9 * to_go
                returns[i].insert(0, to_go)
        for i in group:
            for s, mine in enumerate(returns[i]):
                there = [returns[k][s] for k in group if len(returns[k]) > s]
                found = batch.advantage[i][batch.mask[i] & (turn[i] == s)]
                assert found.tolist() == pytest.approx([mine - sum(there) / len(there)] * len(found), abs=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "reward"),
    [
        ("grpo", {}, episode_reward),
        ("grpo", {"advantage": "turn_reward", "finished": "out"}, turn_reward),
        ("dapo", {}, episode_reward),
        ("hapo", {}, episode_reward),
        ("rloo", {"advantage": "token_reward"}, turn_reward),
    ],
)
def test_methods_train_in_an_environment(tmp_path, method, options, reward):
    """HAPO's temperature rule acts as well, since the trainer draws the turns."""
    trainer = trained(tmp_path, reward, method=method, method_options=options, beta=0.0, max_steps=4)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    logged = {k: v for line in trainer.state.log_history for k, v in line.items()}
    assert logged["completions/max_length"] <= 18
    assert abs(logged["reward"]) <= 3
    if method == "hapo":
        assert trainer.temperature_stats is not None
    else:
        assert hapo.method(method).temperature_rule is None


def test_an_episode_is_truncated_where_no_whole_turn_fits(tmp_path):
    """Nothing is said after its last turn: 4 to 6 prompt tokens, 6 a turn, 3 in between."""
    _, plain, rows = rollout(trained(tmp_path, rollout={"context_length": 20}))
    assert max(len(row["episode_turns"]) for row in rows) == 2
    assert all(own[-1] == 1 and len(prompt) + len(ids) <= 20 for prompt, ids, own in plain)


def test_records_hold_what_the_environment_said(tmp_path):
    """Behind the last token of each turn that it answered, and nowhere else."""
    trainer = trained(tmp_path, run_records=True, record_tokens_every=1, max_steps=1)
    trainer.train()
    tokens = Run(tmp_path).tokens(1)
    answered = 0
    for _, row in tokens.groupby("response"):
        gaps = row["position"].diff().shift(-1).fillna(1) > 1  # tokens that are not the model's have no row
        assert row["said"][gaps].tolist() == [f"={i + 1} " for i in range(gaps.sum())]
        assert row["said"][~gaps].isna().all()
        answered += gaps.sum()
    assert answered > 2


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="begins with 4 tokens, and of 9 are 6 for a turn"):
        rollout(trained(tmp_path / "1", rollout={"context_length": 9}))
    with pytest.raises(ValueError, match="context_length=100, and the model takes 64 tokens"):
        rollout(trained(tmp_path / "2", rollout={"context_length": 100}))


class Letters(Digits):
    """A turn ends with a letter too; nothing is said in between."""

    stop = ("a", "b", "c")

    def answer(self, text):
        super().answer(text)
        return ""


def test_turns_end_as_the_environment_says(tmp_path):
    """Adjacent turns have numbers of their own; a turn that ends so is not cut off, and the model keeps its ends."""
    trainer = trained(tmp_path, kind_of=Letters)
    _, plain, rows = rollout(trainer)
    stops = tiny.tokenizer().convert_tokens_to_ids(list(Letters.stop))
    assert sum(len(row["episode_turns"]) > 1 for row in rows) > 1
    output, _, _ = rollout(trainer)
    for (_, ids, own), row in zip(plain, rows, strict=True):
        assert own == [1] * len(ids)
        begin = 0
        for end, _ in row["episode_turns"]:
            assert end - begin == 6 or ids[end - 1] in [END, *stops]
            assert not set(ids[begin : end - 1]) & {END, *stops}
            begin = end
    assert trainer.model.generation_config.eos_token_id == END
    for i, row in enumerate(rows):
        ends = [end for end, _ in row["episode_turns"]]
        assert output["turn"][i][: ends[-1]].tolist() == [sum(t >= end for end in ends) for t in range(ends[-1])]
    bad = trained(tmp_path / "2", kind_of=type("Bad", (Letters,), {"stop": ("ab",)}))
    with pytest.raises(ValueError, match="ends turns with 'ab', which is no single token"):
        rollout(bad)


def test_messages_go_through_the_chat_template(tmp_path):
    """And so does what the environment says, as the user's."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'a' if m.role == 'user' else 'b' }}{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}b{% endif %}"
    )
    try:
        trainer = trained(tmp_path)
        content = [[{"role": "user", "content": f"{i}+1"}] for i in range(64)]
        trainer.train_dataset = Dataset.from_dict({"prompt": content, "i": [0] * 64})
        _, plain, rows = rollout(trainer)
    finally:
        tokenizer.chat_template = None
    for (prompt, ids, _), row in zip(plain, rows, strict=True):
        assert tokenizer.decode(prompt) == f"a{row['prompt'][0]['content']}<eos>b"
        at = row["episode_turns"][0][0]
        if len(row["episode_turns"]) > 1:
            closed = "" if ids[at - 1] == END else "<eos>"
            said = f"{closed}a=1 <eos>b"
            assert tokenizer.decode(ids[at : at + len(said) - 4 * said.count("<eos>")]) == said
