"""What vLLM knew of its draws, without a scoring pass: entropies and the policy's log-probs are those of a forward."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.platforms.cpu import CpuPlatform

from hapo.samplers.vllm import AdaptiveTemperature, logging_draws

from . import draws_run
from .draws_run import engine, logged, scheduled_ahead
from .reference import BOUNDED, ZSCORE, model, tempered
from .runners import CPU, needs_v2
from .test_engine import shut

# Prompt, rule, T_base, tokens, whether an end of sequence ends it: equal prompts are told apart by what was drawn.
ASKED = [
    ("12+34=", BOUNDED, 0.7, 20, False),
    ("12+34=", BOUNDED, 0.7, 20, False),
    ("907+1=", None, 1.0, 5, False),
    ("5+5=", ZSCORE, 1.3, 24, False),
    ("12+34=", None, 1.0, 20, False),
]
ENDING = [
    ("12+34=", BOUNDED, 2.0, 14, True),
    ("12+34=", BOUNDED, 2.0, 14, True),
    ("12+34=", BOUNDED, 2.0, 14, False),
    ("5+5=", ZSCORE, 1.3, 20, True),
    ("7+", None, 1.0, 14, True),
]
END = 1


def requests(asked):
    """As `logged` takes them."""
    return [
        (
            prompt,
            {
                "temperature": t, "max_tokens": tokens, "ignore_eos": not ends,
                "extra_args": None if rule is None else rule.to_args(),
            },
        )
        for prompt, rule, t, tokens, ends in asked
    ]  # fmt: skip


@torch.no_grad()
def policy(prompt, drawn, t_base):
    """Log-probs of the drawn tokens and entropies under softmax(logits / T_base), float64."""
    logits = model()(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
    logp = (logits.double() / t_base).log_softmax(-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return logp.gather(1, torch.tensor(drawn).unsqueeze(1)).squeeze(1), entropy


def check(asked, prompts, tokens, policy_logp, entropies):
    """Against a forward of transformers."""
    for b, (_, _, t_base, length, ends) in enumerate(asked):
        drawn = len(tokens[b])
        logp, entropy = policy(prompts[b], tokens[b], t_base)
        assert drawn == length or (ends and tokens[b][-1] == END)
        assert (policy_logp[b, :drawn] - logp).abs().max() < 1e-4
        assert (entropies[b, :drawn] - entropy).abs().max() < 1e-4
        assert not entropies[b, drawn:].any() and not policy_logp[b, drawn:].any()


@pytest.fixture(scope="module")
def drawn():
    """Two calls of one engine, what another answer gets of the log, and tokens without a log."""
    llm = engine()
    found = [logged(llm, requests(ASKED)) for _ in range(2)]
    last = found[-1]
    lost = [
        last["log"].draws(last["prompts"], [[*row[:-2], *end] for row in last["tokens"]], last["logps"])
        for end in ([3, 4], [5])
    ]
    params = [SamplingParams(seed=seed, **p) for seed, (_, p) in enumerate(requests(ASKED))]
    plain = [list(o.outputs[0].token_ids) for o in llm.generate([a[0] for a in ASKED], params, use_tqdm=False)]
    shut(llm)
    return found, plain, lost


def test_the_policy_s_log_probs_and_entropies(drawn):
    """Under the temperature rule and without one; T_base of each request."""
    for found in drawn[0]:
        check(ASKED, found["prompts"], found["tokens"], found["draws"].policy_logp, found["draws"].entropy)


def test_a_log_changes_no_draw(drawn):
    """With the same seeds the same tokens."""
    assert [found["tokens"] for found in drawn[0]] == [drawn[1], drawn[1]]


def test_other_tokens_than_those_drawn_are_not_in_the_log(drawn):
    """Another token before the last, or another length."""
    assert drawn[2] == [None, None]


def test_answers_that_end_before_the_engine_knows(monkeypatch):
    """Asynchronous scheduling, the rule on GPUs: one step too many of each, whose tokens come a step later."""
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", scheduled_ahead)
    llm = engine()
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    found = logged(llm, requests(ENDING))
    shut(llm)
    ended = [len(row) < a[3] for row, a in zip(found["tokens"], ENDING, strict=True)]
    assert any(ended) and not all(ended)
    check(ENDING, found["prompts"], found["tokens"], found["draws"].policy_logp, found["draws"].entropy)


@needs_v2
def test_an_engine_with_runner_v2(tmp_path):
    """The same of its log, with both schedulers."""
    given, out = tmp_path / "in.json", tmp_path / "out.json"
    given.write_text(json.dumps({"in turn": requests(ENDING), "ahead": requests(ENDING)}))
    command = [sys.executable, draws_run.__file__, str(given), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(out.read_text()).items():
        assert found["runner"] == "vllm.v1.worker.cpu.model_runner" and found["ahead"] is (name == "ahead")
        assert any(len(row) < a[3] for row, a in zip(found["tokens"], ENDING, strict=True))
        drawn = found["draws"]
        check(
            ENDING, found["prompts"], found["tokens"],
            torch.tensor(drawn["policy_logp"]), torch.tensor(drawn["entropy"]),
        )  # fmt: skip


@needs_v2
def test_runner_v2_tells_rows_by_their_slots():
    """Two slots whose rows change places, a part of a prompt before the first token, and a request that came back."""
    buffers = SimpleNamespace(
        prompt_len=SimpleNamespace(np=np.array([2, 3])),
        all_token_ids=SimpleNamespace(gpu=torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])),
    )
    llm, processor = fake(buffers)
    logits = torch.randn(4, 2, 50, generator=torch.Generator().manual_seed(0)) * 2

    def step(which, slots, seen, fed):
        index = torch.tensor(slots)
        ctx = SimpleNamespace(
            idx_mapping_np=index.numpy(), expanded_idx_mapping=index, input_ids=torch.tensor(fed),
            seq_lens_upper_bound_np=np.array(seen),
        )  # fmt: skip
        return processor.apply(logits[which].clone(), ctx)

    with logging_draws(llm) as log:
        for slot, rule in ((0, BOUNDED), (1, None)):
            assert processor.add_request(slot, params(rule))
        first = step(0, [0, 1], [2, 2], [6, 8])  # slot 1 has read 2 of its 3 tokens
        second = step(1, [1, 0], [3, 3], [9, 11])
        third = step(2, [0, 1], [4, 4], [12, 21])
    assert torch.allclose(first[0].double(), tempered(logits[0, :1], BOUNDED, 1.0)[0], atol=1e-5)
    assert torch.equal(second[0], logits[1, 0])

    def q(tokens, rows):
        return [row.log_softmax(-1)[t].item() for t, row in zip(tokens, rows, strict=True)]

    answers = [[11, 12, 13], [21, 22]]
    logps = [q(answers[0], (first[0], second[1], third[0])), q(answers[1], (second[0], third[1]))]
    draws = log.draws([[5, 6], [7, 8, 9]], answers, logps)
    expected = [
        q(answers[0], (logits[0, 0], logits[1, 1], logits[2, 0])),
        q(answers[1], (logits[1, 0], logits[2, 1])),
    ]
    assert draws.policy_logp[0].tolist() == pytest.approx(expected[0], abs=1e-5)
    assert draws.policy_logp[1].tolist() == pytest.approx([*expected[1], 0.0], abs=1e-5)

    with logging_draws(llm) as log:
        processor.add_request(0, params(None))
        step(3, [0, 1], [4, 4], [12, 21])  # begins at its third token
    assert log.draws([[5, 6]], [[11, 12, 13]], [[-1.0] * 3]) is None


def params(rule):
    return SamplingParams(temperature=1.0, extra_args=None if rule is None else rule.to_args())


def fake(states):
    """What `logging_draws` reads of an engine with Runner V2, around a processor."""
    config = SimpleNamespace(speculative_config=None)
    processor = AdaptiveTemperature(config, states)
    runner = SimpleNamespace(sampler=SimpleNamespace(logits_processors=[processor]), device=CPU)
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    return SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor, vllm_config=config)), processor
