"""The asynchronous trainer computes what the core computes, however an optimiser step is cut."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PromptTuningConfig
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM, TrainerCallback
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import (
    RolloutGroup,
    TurnRecord,
    _AsyncRolloutLoop,
    _chain_to_sequences,
)
from trl.experimental.async_grpo.packing import TreeRow

import hapo
from hapo.engines.trl.asynchronous.cpu import no_gpu_asked, take_plain_attention
from hapo.engines.trl.asynchronous.steps import cut
from hapo.engines.trl.asynchronous.worker import UNKNOWN, DrawnLogp, VersionedLoop, generate_request, versions_of
from hapo.samplers.decoding_rules import EDT
from hapo.samplers.rule import TemperatureRule
from hapo.trl import AsyncHAPOConfig, AsyncHAPOTrainer
from tests.engines import async_runs, tiny
from tests.engines.fixed_rollout import Gradients
from tests.engines.test_trl_exactness import OF_TINY_MODEL, ROUNDING, difference
from tests.two_ranks import ASYNCHRONOUS

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("async")


SPLITS = [(16, 1, 0), (8, 2, 0), (4, 4, 0), (16, 1, 30)]
"""Answers of a micro-batch, accumulation, tokens of a pass."""

METHODS: dict[str, dict[str, Any]] = {
    "dapo": {"method": "dapo"},
    "hapo": {"method": "hapo", "method_options": {"components": "BCD"}},
    "hapo, tempered": {"method_object": hapo.method("hapo", kl_coef=0.0), "old_policy": "current"},
    "gspo": {"method": "gspo"},
    "stapo": {"method": "stapo", "method_options": {"tau_p": 0.5}},  # its step reads the current policy
}


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_loss_and_gradient_do_not_depend_on_accumulation_and_packing(base, tmp_path, options, monkeypatch):
    if "method_object" in options:  # a worker of one's own is refused with an adaptive temperature
        monkeypatch.setattr("hapo.engines.trl.asynchronous.trainer.check_arguments", lambda *_: None)
    found = []
    for size, accumulation, budget in SPLITS:
        schedule = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        found.append(
            async_runs.run(base, tmp_path / f"{size}-{budget}", token_budget=budget, **schedule, **options)
        )
    (whole, first), *others = found
    for split, trainer in others:
        assert losses(trainer) == pytest.approx(losses(first), abs=1e-6)
        for reference, gradient in zip(whole.steps, split.steps, strict=True):
            assert difference(reference, gradient) <= ROUNDING


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_the_gradient_does_not_depend_on_the_ranks(base, tmp_path, name, two_ranks):
    ranks = load_file(two_ranks / f"{name}.safetensors")
    whole, _ = async_runs.run(base, tmp_path, **ASYNCHRONOUS[name])
    for i, step in enumerate(whole.steps):
        assert difference(step, {n: ranks[f"{i}.{n}"] for n in step}) <= ROUNDING


def test_trls_own_loss_depends_on_the_accumulation(base, tmp_path):
    """The same samples, the same policy: its micro-batches have a normaliser each."""
    found = []
    for size, accumulation, _ in SPLITS[:3]:
        found.append(trls_gradient(base, tmp_path / str(size), size, accumulation))
    assert difference(found[0], found[1]) > 0.02
    assert difference(found[0], found[2]) > 0.02


def trls_gradient(base, folder, size, accumulation):
    options = async_runs.options(
        folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        token_budget=0,
        max_steps=1,
    )
    with no_gpu_asked():
        trainer = AsyncGRPOTrainer(
            async_runs.model_folder(base),
            tiny.count_digits,
            AsyncGRPOConfig(**options),
            train_dataset=tiny.data(),
            rollout_worker=async_runs.FixedWorker(with_advantages),
            weight_transfer=async_runs.NoTransfer(),
        )
    take_plain_attention(trainer.model)
    keep = Gradients()
    trainer.add_callback(keep)
    trainer.train()
    return keep.steps[0]


def with_advantages(number, version):
    """TRL's advantages, which its worker makes."""
    samples = async_runs.group_of(number, version)
    rewards = np.array([sample.metrics["reward"] for sample in samples])
    for sample, reward in zip(samples, rewards, strict=True):
        sample.advantage = (reward - rewards.mean()) / (rewards.std() + 1e-8)
    return samples


def trained(sample, values):
    """Of the tokens that the loss is taken over."""
    return torch.as_tensor(values)[1:][torch.from_numpy(sample.completion_mask)[1:] > 0]


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def plain_scores(net, sample):
    """Log-probs and entropies of the trained tokens of a row, from a forward of its own."""
    ids = torch.from_numpy(sample.input_ids)
    scores = net(input_ids=ids[None]).logits[0].log_softmax(-1).roll(1, 0)
    taken, entropy = scores.gather(-1, ids[:, None])[:, 0], -(scores.exp() * scores).sum(-1)
    places = torch.arange(1, len(ids))[torch.from_numpy(sample.completion_mask)[1:] > 0]
    return taken[places], entropy[places]


def replay(core, weights, groups, old_policy="sampler"):
    """Loss and gradient of an optimiser step by the engine-free core; a conversation is one response."""
    net = tiny.model()
    net.load_state_dict(weights)
    conversations = [rows for group in groups for rows in group]
    drawn = [torch.cat([trained(s, s.old_log_probs) for s in rows]) for rows in conversations]
    scores = [[plain_scores(net, s) for s in rows] for rows in conversations]
    logp, entropy = (padded([torch.cat([s[i] for s in rows]) for rows in scores]) for i in range(2))
    old = {"old_logp": padded(drawn)}
    if old_policy == "current":
        old = {"old_logp": logp.detach(), "sampler_logp": padded(drawn)}
    batch = core.prepare(
        hapo.TokenBatch(
            mask=padded([torch.ones(len(x), dtype=torch.bool) for x in drawn]),
            old_entropy=entropy.detach(),
            reward=torch.tensor([rows[0].metrics["reward"] for rows in conversations]),
            group=torch.tensor([rows[0].group_id for rows in conversations]),
            **old,
        )
    )
    out = core.loss(core.step(batch.replace(logp=logp, entropy=entropy.detach())))
    out.loss.backward()
    return out.loss.item(), {n: p.grad for n, p in net.named_parameters()}


def fixed_groups(first, n=4, make=async_runs.group_of):
    found = []
    for number in range(first, first + n):
        rows: dict[int, list[Any]] = {}
        for sample in make(number, 0):
            rows.setdefault(sample.response, []).append(sample)
        found.append(list(rows.values()))
    return found


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hapo", {"components": "BCD"}),
        ("stapo", {"tau_p": 0.5}),
        *[(n, OF_TINY_MODEL.get(n, {})) for n in hapo.methods("policy") if n != "hapo" and not hapo.method(n).likelihood],
    ],
)  # fmt: skip
def test_every_method_equals_the_core(base, tmp_path, method, options):
    keep, trainer = async_runs.run(
        base,
        tmp_path,
        method=method,
        method_options=options,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        token_budget=40,
    )
    core = hapo.method(method, **options, kl_coef=0.0)
    for step, (weights, gradient) in enumerate(zip(keep.weights, keep.steps, strict=True)):
        loss, expected = replay(core, weights, fixed_groups(4 * step))
        assert losses(trainer)[step] == pytest.approx(loss, abs=5e-6)
        if "split" not in core.breaks:
            assert difference(expected, gradient) <= ROUNDING


def test_with_the_current_policy_as_the_old_one_the_weight_corrects_for_the_sampler(base, tmp_path):
    core = hapo.method("dapo", kl_coef=0.0)
    keep, trainer = async_runs.run(base, tmp_path, method="dapo", old_policy="current")
    loss, expected = replay(core, keep.weights[0], fixed_groups(0), "current")
    assert losses(trainer)[0] == pytest.approx(loss, abs=5e-6)
    assert difference(expected, keep.steps[0]) <= ROUNDING
    line = trainer.state.log_history[0]
    assert line["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert line["sampler_weight/mean"] < 0.9


def forked(number, version):
    """The second answer was rewritten after its first turn: two rows, of which the second has two turns."""
    first, second, *others = async_runs.group_of(number, version)
    prompt = second.input_ids[:4]
    later = [*prompt, 9, 9, *second.input_ids[4:], 7, 8, 9]
    drawn = np.zeros(len(later), dtype=int)
    drawn[[-5, -2, -1]] = 1
    logps = np.where(drawn, -2.0, 0.0)
    reward = second.metrics["reward"]
    more = async_runs.sample_of(
        number, 1, 5, later, drawn, logps, reward, np.where(drawn, version, UNKNOWN), version
    )
    for sample in (first, second, *others):
        sample.of_group = 5
    return [first, second, more, *others]


def test_a_conversation_is_one_response_whatever_rows_it_takes(base, tmp_path):
    worker = async_runs.FixedWorker(forked)
    keep, trainer = async_runs.run(
        base, tmp_path, worker=worker, method="gspo", per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    loss, expected = replay(hapo.method("gspo", kl_coef=0.0), keep.weights[0], fixed_groups(0, make=forked))
    assert losses(trainer)[0] == pytest.approx(loss, abs=5e-6)
    assert difference(expected, keep.steps[0]) <= ROUNDING


def test_a_group_with_too_many_samples_is_refused(base, tmp_path):
    def without_telling(number, version):
        samples = forked(number, version)
        for sample in samples:
            sample.of_group = 0
        return samples

    made = async_runs.trainer(base, tmp_path, worker=async_runs.FixedWorker(without_telling), method="dapo")
    with pytest.raises(ValueError, match="group 0 has more than its 4 samples: .* WholeGroupSample"):
        made.train()


def test_stale_groups_are_dropped_whole(base, tmp_path):
    def some_stale(number, version):
        return async_runs.group_of(number, version - 9 * (number % 2))

    keep, trainer = async_runs.run(
        base, tmp_path, worker=async_runs.FixedWorker(some_stale), method="grpo", max_steps=1
    )
    _, expected = replay(
        hapo.method("grpo", kl_coef=0.0), keep.weights[0], [fixed_groups(n, 1)[0] for n in (0, 2, 4, 6)]
    )
    assert difference(expected, keep.steps[0]) <= ROUNDING
    assert trainer.state.log_history[0]["sample/dropped_stale_total"] >= 16


def test_staleness_of_each_token_is_in_records_and_log(base, tmp_path):
    folder = tmp_path / "run"
    _, trainer = async_runs.run(
        base, folder, method="dapo", run_records=True, record_tokens_every=1, record_tokens_rows=8, token_budget=30
    )
    table = pq.read_table(folder / "tokens").to_pandas()
    assert sorted(table.step.unique()) == [1, 2]
    for step in (1, 2):
        rows = table[table.step == step]
        groups = fixed_groups(4 * (step - 1), 2)
        samples = [sample for group in groups for (sample,) in group]
        assert sorted(rows.response.unique()) == list(range(8))
        for number, sample in enumerate(samples):
            of_one = rows[rows.response == number].sort_values("position")
            drawn = sample.completion_mask > 0
            assert of_one.id.tolist() == sample.input_ids[drawn].tolist()
            assert of_one.logp_old.tolist() == pytest.approx(sample.old_log_probs[drawn].tolist(), abs=1e-6)
            assert of_one.prompt.iloc[0] == tiny.tokenizer().decode(sample.input_ids[~drawn])
            # The first two tokens are of one version before; the second step's were drawn under version 1.
            expected = [int(i < 2) + (step - 1) for i in range(drawn.sum())]
            assert of_one.staleness.tolist() == expected
    assert [line["staleness/token_max"] for line in trainer.state.log_history[:2]] == [1.0, 2.0]
    assert table.entropy.gt(0).all()


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_with_the_first_group_that_it_had_not_learnt_of(base, tmp_path):
    """From the checkpoint of step 2: a worker that draws by number and version alone gives the same run."""
    options = {"method": "hapo", "method_options": {"components": "BCD"}, "max_steps": 5, "optim": "adamw_torch"}
    options |= {"run_records": True, "record_tokens_every": 1, "per_device_train_batch_size": 8, "save_steps": 2}
    options |= {"gradient_accumulation_steps": 2, "save_strategy": "steps"}
    whole, trainer = async_runs.run(base, tmp_path / "whole", **options)
    child = os.fork()
    if child == 0:
        killed = async_runs.trainer(base, tmp_path / "killed", **options)
        killed.add_callback(Kill())
        killed.train()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed/checkpoints").iterdir()] == ["checkpoint-2"]
    resumed, keep = async_runs.trainer(base, tmp_path / "killed", **options), Gradients()
    resumed.add_callback(keep)
    resumed.train(resume_from_checkpoint=True)
    for reference, again in zip(whole.steps[2:], keep.steps, strict=True):
        assert all(torch.equal(reference[name], again[name]) for name in reference)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    again = [line for line in resumed.state.log_history if "loss" in line]
    assert [line["loss"] for line in lines] == [line["loss"] for line in again]
    steps = pq.read_table(tmp_path / "killed/tokens").to_pandas().step.unique()
    assert sorted(steps) == [1, 2, 3, 4, 5]


def test_an_epoch_is_over_when_every_group_was_learnt_from(base, tmp_path):
    """A quarter of 64 prompts, four groups a step; TRL alone counts the groups of the next step too, and stops early."""
    _, trainer = async_runs.run(base, tmp_path, method="dapo", max_steps=-1, num_train_epochs=0.25)
    assert trainer.state.global_step == 4


def test_passes_hold_whole_responses_in_order_and_every_rank_has_as_many():
    responses = [
        [{"input_ids": np.arange(n), "completion_mask": np.ones(n, int), "group_id": i // 4}]
        for i, n in enumerate([9, 2, 8, 7, 1, 1, 1, 1])
    ]
    ((*rows,),) = cut(responses, micro_batches=1, ranks=2, budget=10)
    assert len(rows) == 2 * 3  # the first rank needs three passes, the second has room in one
    assert all(row.samples for row in rows)
    assert [s["number"] for row in rows for s in row.samples] == list(range(8))


@pytest.mark.parametrize("window", [None, 3])
def test_plain_tree_attention_is_the_attention_of_each_sample_alone(window):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=30, num_key_value_heads=2, sliding_window=window, head_dim=8, **sizes)
    net = MistralForCausalLM(config).eval()
    samples = [[3, 4, 5, 6, 7, 8], [3, 4, 5, 9, 9], [3, 4, 5, 6, 1], [2, 2]]
    row = TreeRow()
    for ids in samples:
        row.add(
            {
                "input_ids": np.array(ids),
                "completion_mask": np.ones(len(ids), int),
                "group_id": 0,
                "advantage": 0.0,
            }
            | {"old_log_probs": np.zeros(len(ids))}
        )
    packed = row.pack()
    assert len(packed["input_ids"]) < sum(map(len, samples))  # prefixes are shared
    with torch.no_grad():
        alone = torch.cat([net(input_ids=torch.tensor([ids])).logits[0, :-1] for ids in samples])
        take_plain_attention(net)
        tree = {k: packed[k] for k in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
        ids, positions = packed["input_ids"][None], packed["position_ids"][None]
        together = net(input_ids=ids, position_ids=positions, **tree).logits[0, packed["token_index"]]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_versions_go_through_trls_own_reconciliation_of_turns():
    first = TurnRecord([5, 6], [1, 2, 3], [*map(DrawnLogp, (-0.1, -0.2, -0.3), (4, 4, 5))])
    second = TurnRecord([5, 6, 1, 2, 8], [9], [DrawnLogp(-0.4, 6)])  # the last token came back as another
    (row,), _ = _chain_to_sequences([first, second], "", fork_threshold=10)
    assert row.input_ids == [5, 6, 1, 2, 8, 9]
    assert row.completion_mask == [0, 0, 1, 1, 0, 1]
    assert [getattr(x, "version", UNKNOWN) for x in row.old_log_probs] == [-1, -1, 4, 4, -1, 6]


@pytest.mark.parametrize("labelled", [True, False])
def test_the_loop_asks_with_the_rule_and_tells_which_weights_drew_each_token(tmp_path, labelled, monkeypatch):
    asked = []

    async def post(self, path, payload, timeout, max_retries=3):
        asked.append((path, payload))
        logprobs = {"content": [{"logprob": -0.1}, {"logprob": -0.2}], "token_logprobs": [-0.1, -0.2]}
        spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
        choice = {"token_ids": [7, 1], "logprobs": logprobs} | ({"weight_versions": spans} if labelled else {})
        return {"choices": [choice]}

    monkeypatch.setattr(_AsyncRolloutLoop, "_post", post)
    loop = object.__new__(VersionedLoop)
    rule = TemperatureRule(EDT(theta=0.5))
    rule.save(tmp_path / "rule.json")
    vars(loop).update(
        labelled=labelled, rule_file=tmp_path / "rule.json", _model_version_value=SimpleNamespace(value=4),
        model_name="m", lora_name=None, max_tokens=2, temperature=1.0, top_p=1.0, top_k=0, min_p=None,
        repetition_penalty=1.0, request_timeout=1, eos_token_ids=[1], reward_func_names=["right"],
        reward_funcs=[lambda completions, **_: [float(len(completions) - i) for i in range(len(completions))]],
        _env_reward_types=[],
    )  # fmt: skip
    ids, logps = asyncio.run(loop._generate_one_turn([5, 6]))
    ((path, payload),) = asked
    assert path == ("/inference/v1/generate" if labelled else "/v1/completions")
    sent = payload["sampling_params"]["extra_args"] if labelled else payload["vllm_xargs"]
    assert sent == rule.to_args()
    rows, _ = _chain_to_sequences([TurnRecord([5, 6], ids, logps)], "", fork_threshold=10)
    group = RolloutGroup(
        [[]] * 2, {}, [[]] * 2, [ids, []], [rows, []], [0, 0], [0, 0], 4, 9, [None] * 2, [None] * 2
    )
    first, empty = asyncio.run(loop._score_group(group))
    assert first.versions.tolist() == [UNKNOWN, UNKNOWN, *((3, 4) if labelled else (4, 4))]
    assert (first.response, empty.response, first.of_group, first.metrics["reward"]) == (0, 1, 2, 2.0)
    assert not empty.completion_mask.any() and empty.metrics["reward"] == 1.0


def test_versions_of_spans():
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 5}]
    assert versions_of(spans, 5, 1) == [3, 3, 4, 4, 4]
    assert versions_of([{"version": "default", "start": 0, "end": 2}], 2, 1) == [1, 1]
    assert versions_of(None, 2, 7) == [7, 7]


def test_a_request_of_trls_as_one_to_the_token_interface():
    asked = {"model": "m", "prompt": [1, 2], "max_tokens": 8, "temperature": 0.7, "n": 1, "logprobs": 0, "seed": 3}
    request = generate_request(asked | {"return_token_ids": True}, {"hapo_tau": 0.2})
    assert request["token_ids"] == [1, 2]
    sampling = {"max_tokens": 8, "temperature": 0.7, "n": 1, "logprobs": 0, "seed": 3, "detokenize": False}
    assert request["sampling_params"] == sampling | {"extra_args": {"hapo_tau": 0.2}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "dapoo"}, "dapo"),
    "reference model": ({"method": "grpo", "method_options": {"kl_coef": 0.04}}, "loads no reference model"),
    "masked diffusion": ({"method": "diffu_grpo"}, "masked-diffusion"),
    "token rewards": (
        {"method": "grpo", "method_options": {"advantage": "token_reward"}},
        "a reward of each token",
    ),
    "tempered sampler": ({"method": "hapo", "old_policy": "sampler"}, 'set old_policy="current"'),
    "weight of the sampler": (
        {"method": "dapo", "old_policy": "sampler", "method_options": {"sampler_cap": 3.0}},
        "leave it out",
    ),
    "clip range": ({"method": "dapo", "epsilon": 0.1}, "eps_low"),
    "old policy": ({"method": "dapo", "old_policy": "proximal"}, "one of sampler, current"),
    "temperature": ({"method": "dapo", "temperature": 0.0}, "above 0"),
    "records": ({"method": "dapo", "record_tokens_rows": 0}, "at least 1"),
    "optimiser": ({"method": "dapo", "optim": "adamm"}, "no optimizer"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_config_refuses(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        AsyncHAPOConfig(**async_runs.options(tmp_path, **options))


def test_what_the_trainer_refuses_before_work(base, tmp_path):
    with pytest.raises(ValueError, match="6 answers .* no whole groups of num_generations=4"):
        async_runs.trainer(base, tmp_path, method="dapo", per_device_train_batch_size=6)
    with pytest.raises(ValueError, match="a rollout_worker of your own samples by itself"):
        async_runs.trainer(base, tmp_path, method="hapo")
    config = AsyncHAPOConfig(**async_runs.options(tmp_path, method="dapo"))
    gated = SimpleNamespace(peft_type="GATERA")
    for name, value, reason in [
        ("environment_factory", dict, "episodes of environments"),
        ("peft_config", gated, "neither: its gate"),
        ("peft_config", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1), "prompt-learning"),
    ]:
        with pytest.raises(ValueError, match=reason):
            AsyncHAPOTrainer(async_runs.model_folder(base), tiny.count_digits, config, **{name: value})
    with pytest.raises(TypeError, match="must be an AsyncHAPOConfig"):
        AsyncHAPOTrainer(async_runs.model_folder(base), args=AsyncGRPOConfig(**async_runs.options(tmp_path)))


def test_a_checkpoint_of_another_method_is_refused(base, tmp_path):
    options = {"method": "dapo", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    async_runs.run(base, tmp_path, **options)
    with pytest.raises(ValueError, match="another method"):
        async_runs.trainer(base, tmp_path, **options | {"method": "gspo"}).train(resume_from_checkpoint=True)
